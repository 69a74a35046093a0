//! One connection that was let in: its bytes, whose it is, and when it ends.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Sleep, sleep};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::seats::Seat;
use crate::access::Peer;

/// The first bytes of HTTP/2, by which a client shows that it means to speak it.
const PREFACE: usize = 24;

pub(super) enum Io {
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

pub(super) struct Connection {
    io: Io,
    peer: Peer,
    _seat: Seat,
    /// Until the preface is here, and it is known who calls.
    begin: Option<Pin<Box<Sleep>>>,
    read: usize,
    /// When the caller's certificate ends, and all its calls with it.
    end: Option<Pin<Box<Sleep>>>,
}

impl Connection {
    pub(super) fn new(io: Io, peer: Peer, seat: Seat, patience: Duration) -> Self {
        let until = match &peer {
            Peer::Known(caller) => caller.until,
            Peer::Stranger(_) => None,
        };
        let left = until.map(|until| until.duration_since(SystemTime::now()).unwrap_or_default());
        Self {
            io,
            peer,
            _seat: seat,
            begin: Some(Box::pin(sleep(patience))),
            read: 0,
            end: left.map(|left| Box::pin(sleep(left))),
        }
    }

    pub(super) fn peer(&self) -> &Peer {
        &self.peer
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

fn is_over(timer: &mut Option<Pin<Box<Sleep>>>, context: &mut Context<'_>) -> bool {
    timer.as_mut().is_some_and(|timer| timer.as_mut().poll(context).is_ready())
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if is_over(&mut this.end, context) {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the certificate has ended")));
        }
        if this.peer.is_given_up() {
            let why = "too many of its calls were refused";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::PermissionDenied, why)));
        }
        let before = buffer.filled().len();
        let done = match &mut this.io {
            Io::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Io::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        };
        if this.begin.is_some() {
            this.read += buffer.filled().len() - before;
            if this.read >= PREFACE && this.peer.is_known() {
                this.begin = None;
            } else if is_over(&mut this.begin, context) {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "nothing was let in")));
            }
        }
        done
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
            Io::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Unix(stream) => Pin::new(stream).poll_flush(context),
            Io::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Unix(stream) => Pin::new(stream).poll_shutdown(context),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Unix(stream) => Pin::new(stream).poll_write_vectored(context, buffers),
            Io::Tls(stream) => Pin::new(stream).poll_write_vectored(context, buffers),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Unix(stream) => stream.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
