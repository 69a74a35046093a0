//! Bytes from one thread that writes to one that reads.

use std::io::{self, Read, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Of writes on their way: with a buffer's 256 KiB each, 4 MiB.
const ON_THE_WAY: usize = 16;

pub(crate) fn pair() -> (Sender, Reader) {
    let (sender, receiver) = sync_channel(ON_THE_WAY);
    (Sender { channel: Some(sender) }, Reader { channel: receiver, chunk: Vec::new(), read: 0 })
}

/// Takes everything, also when nobody reads any more: the one that stopped reading says why.
pub(crate) struct Sender {
    channel: Option<SyncSender<Vec<u8>>>,
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(channel) = &self.channel
            && !bytes.is_empty()
            && channel.send(bytes.to_vec()).is_err()
        {
            self.channel = None;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends when the sender is dropped.
pub(crate) struct Reader {
    channel: Receiver<Vec<u8>>,
    chunk: Vec<u8>,
    read: usize,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.read == self.chunk.len() {
            let Ok(chunk) = self.channel.recv() else { return Ok(0) };
            (self.chunk, self.read) = (chunk, 0);
        }
        let n = buffer.len().min(self.chunk.len() - self.read);
        buffer[..n].copy_from_slice(&self.chunk[self.read..self.read + n]);
        self.read += n;
        Ok(n)
    }
}
