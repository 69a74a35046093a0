//! Questions to the kernel over netlink, and its answers.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

/// The kernel answers at once; this is for one that does not.
const PATIENCE: Duration = Duration::from_secs(10);
/// The kernel makes no longer messages of a list than half of it.
const BUFFER: usize = 64 << 10;
/// nlmsghdr
const HEADER: usize = 16;
/// nlattr
const ATTRIBUTE: usize = 4;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// NLA_F_NESTED; the two highest bits of an attribute's kind are flags.
const NESTED: u16 = 0x8000;
const KIND: u16 = 0x3fff;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Ask {
    /// For a list of all that fits.
    List,
    /// For one thing to be done.
    Do,
}

impl Ask {
    fn flags(self) -> u16 {
        match self {
            // NLM_F_REQUEST | NLM_F_ROOT | NLM_F_MATCH
            Self::List => 0x301,
            // NLM_F_REQUEST | NLM_F_ACK
            Self::Do => 0x5,
        }
    }
}

/// A socket to one of the kernel's parts, in the network namespace of the thread that made it.
#[derive(Debug)]
pub(crate) struct Netlink(OwnedFd);

impl Netlink {
    /// # Errors
    /// Where the kernel has no such part.
    pub(crate) fn open(part: Protocol) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(part))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        Ok(Self(socket))
    }

    /// Sends one message, and hands over the body of each that comes in answer. Blocks, for milliseconds.
    ///
    /// # Errors
    /// What the kernel says against it.
    pub(crate) fn ask(
        &self,
        ask: Ask,
        kind: u16,
        body: &[u8],
        mut take: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend(ask.flags().to_ne_bytes());
        // Its number and the sender's, neither of which is needed: one question is asked at a time.
        message.extend([0; 8]);
        message.extend(body);
        send(&self.0, &message, SendFlags::empty())?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let (length, _) = recv(&self.0, buffer.as_mut_slice(), RecvFlags::empty())?;
            let mut rest = &buffer[..length];
            while let Some((kind, body)) = next(&mut rest) {
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return outcome(body),
                    _ => take(body),
                }
            }
        }
    }
}

/// nlmsgerr begins with an error number, negative, or 0 for what was done.
fn outcome(body: &[u8]) -> io::Result<()> {
    let number = body.get(..4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match number {
        Some(0) => Ok(()),
        Some(number) => Err(io::Error::from_raw_os_error(-number)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Takes the first message off: its kind and its body.
fn next<'a>(rest: &mut &'a [u8]) -> Option<(u16, &'a [u8])> {
    let length = u32::from_ne_bytes(rest.get(0..4)?.try_into().ok()?);
    let length = usize::try_from(length).ok().filter(|length| *length >= HEADER)?;
    let kind = u16::from_ne_bytes(rest.get(4..6)?.try_into().ok()?);
    let body = rest.get(HEADER..length)?;
    *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, body))
}

/// One attribute, as it goes into a message.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(ATTRIBUTE + value.len()).unwrap_or_default();
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Attributes in one.
pub(crate) fn nest(kind: u16, inner: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &inner.concat())
}

/// The value of an attribute among others, in one another: of each kind that is named, the first.
pub(crate) fn value<'a>(mut attributes: &'a [u8], path: &[u16]) -> Option<&'a [u8]> {
    let (kind, inner) = path.split_first()?;
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(0..2)?.try_into().ok()?));
        let found = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(ATTRIBUTE..length)?;
        if found & KIND == *kind {
            return if inner.is_empty() { Some(value) } else { self::value(value, inner) };
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attribute_is_found_in_others_and_nothing_in_what_is_cut_off() {
        let inner = [attribute(1, b"one"), attribute(2, b"second")];
        let bytes = [attribute(7, b""), nest(5, &inner), attribute(2, b"outer")].concat();
        assert_eq!(value(&bytes, &[5, 2]), Some(&b"second"[..]));
        assert_eq!(value(&bytes, &[2]), Some(&b"outer"[..]));
        assert_eq!(value(&bytes, &[7]), Some(&b""[..]));
        assert_eq!(value(&bytes, &[5, 3]), None);
        assert_eq!(value(&bytes, &[9]), None);
        for end in 0..bytes.len() - 8 {
            assert_eq!(value(&bytes[..end], &[2]), None, "{end}");
        }
        // A length that is none: no loop without an end.
        assert_eq!(value(&[0; 64], &[2]), None);
    }
}
