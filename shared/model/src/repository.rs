//! Repositories of registries, and images in them.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;

/// Of docker's: what stands for a tag that is not said.
const LATEST: &str = "latest";
const MAX_TAG: usize = 128;
/// Of host, path and the slash between them, as docker has it.
const MAX_NAME: usize = 255;

/// `registry.example/team/app`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// With the port, where one is said; empty where the name says none and docker knows where to look.
    pub host: String,
    pub path: String,
}

/// An image in a repository: `registry.example/team/app:1.2`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageReference {
    pub repository: Repository,
    /// Without effect where there is a digest.
    pub tag: String,
    pub digest: Option<Digest>,
}

/// The text is no name of a repository, or of an image in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("wanted a registry's host, a slash and a name in lower case, such as registry.example/app")]
pub struct NotARepository;

impl Repository {
    /// Whether the registry is on this machine, where nobody listens in between: it needs no TLS.
    pub fn is_on_loopback(&self) -> bool {
        let bare = match self.host.rsplit_once(':') {
            Some((bare, _)) if !self.host.ends_with(']') => bare,
            _ => &self.host,
        };
        bare == "localhost" || bare == "127.0.0.1" || bare == "[::1]"
    }
}

impl ImageReference {
    /// As docker and Containerfiles have it: also without a registry, such as `debian:12`.
    ///
    /// # Errors
    /// It is no name of an image in this form either.
    pub fn as_docker_reads(text: &str) -> Result<Self, NotARepository> {
        let is_short = |text: &str| text.split_once('/').is_none_or(|(first, _)| !is_host(first));
        let (name, _) = text.split_once('@').unwrap_or((text, ""));
        if !is_short(name) {
            return text.parse();
        }
        // Any host will do to read the rest by.
        let mut read: Self = format!("localhost/{text}").parse()?;
        read.repository.host.clear();
        Ok(read)
    }
}

impl FromStr for Repository {
    type Err = NotARepository;

    fn from_str(text: &str) -> Result<Self, NotARepository> {
        let (host, path) = text.split_once('/').ok_or(NotARepository)?;
        let good = is_host(host) && path.split('/').all(is_component) && text.len() <= MAX_NAME;
        good.then(|| Self { host: host.to_owned(), path: path.to_owned() }).ok_or(NotARepository)
    }
}

impl FromStr for ImageReference {
    type Err = NotARepository;

    fn from_str(text: &str) -> Result<Self, NotARepository> {
        let (text, digest) = match text.split_once('@') {
            Some((text, digest)) => (text, Some(digest.parse().map_err(|_| NotARepository)?)),
            None => (text, None),
        };
        // A colon before the last slash is that of a port.
        let colon = text.rfind(':').filter(|at| text.rfind('/').is_some_and(|slash| slash < *at));
        let (repository, tag) = colon.map_or((text, LATEST), |at| (&text[..at], &text[at + 1..]));
        if !is_tag(tag) {
            return Err(NotARepository);
        }
        Ok(Self { repository: repository.parse()?, tag: tag.to_owned(), digest })
    }
}

/// One that is told from the first part of a path: with a dot or a port, or `localhost`.
fn is_host(text: &str) -> bool {
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) if !text.ends_with(']') => (name, Some(port)),
        _ => (text, None),
    };
    let is_part = |part: &str| {
        let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !part.is_empty() && part.bytes().all(inner) && !part.starts_with('-') && !part.ends_with('-')
    };
    let is_port = |port: &str| {
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        digits && port.parse().is_ok_and(|port: u16| port > 0)
    };
    let inner = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    let is_name = match inner {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => name.split('.').all(is_part) && (name.contains('.') || name == "localhost" || port.is_some()),
    };
    is_name && port.is_none_or(is_port)
}

/// In lower case, with one `.`, one or two `_` or any number of `-` between letters and digits.
fn is_component(text: &str) -> bool {
    let is_inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let mut separators = text.split(is_inner).filter(|it| !it.is_empty());
    text.starts_with(is_inner)
        && text.ends_with(is_inner)
        && separators.all(|it| matches!(it, "." | "_" | "__") || it.bytes().all(|byte| byte == b'-'))
}

/// Whether it can be the tag of an image.
pub(crate) fn is_tag(text: &str) -> bool {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    (1..=MAX_TAG).contains(&text.len())
        && text.starts_with(is_word)
        && text.chars().all(|c| is_word(c) || matches!(c, '.' | '-'))
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.is_empty() {
            return f.write_str(&self.path);
        }
        write!(f, "{}/{}", self.host, self.path)
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.digest {
            Some(digest) => write!(f, "{}@{digest}", self.repository),
            None => write!(f, "{}:{}", self.repository, self.tag),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_read_as_it_is_written() {
        for (text, shown) in [
            ("registry.example/app", "registry.example/app:latest"),
            ("registry.example:5000/team/app:1.2", "registry.example:5000/team/app:1.2"),
            ("localhost/a__b/c--d/e.f:V_1.0-x", "localhost/a__b/c--d/e.f:V_1.0-x"),
            ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ] {
            let reference: ImageReference = text.parse().unwrap();
            assert_eq!(reference.to_string(), shown);
            assert_eq!(shown.parse(), Ok(reference));
        }
        let digest = Digest::of(b"x");
        let pinned: ImageReference = format!("registry.example/app:1@{digest}").parse().unwrap();
        assert_eq!(pinned.to_string(), format!("registry.example/app@{digest}"));
    }

    #[test]
    fn docker_s_names_may_leave_the_registry_out() {
        let digest = Digest::of(b"x");
        for (text, shown) in [
            ("debian", "debian:latest".to_owned()),
            ("debian:12", "debian:12".to_owned()),
            ("team/app:1", "team/app:1".to_owned()),
            ("localhost/app", "localhost/app:latest".to_owned()),
            ("registry.example:5000/app:1", "registry.example:5000/app:1".to_owned()),
            (&format!("debian:12@{digest}"), format!("debian@{digest}")),
        ] {
            let read = ImageReference::as_docker_reads(text).unwrap();
            assert_eq!(read.to_string(), shown);
            assert!(!read.repository.is_on_loopback() || text.starts_with("localhost"), "{text}");
        }
        for wrong in
            ["", "-x", "Debian", "debian:", "a//b", "a b", "../a", "debian\n", "user:x@debian", "a:1:2"]
        {
            assert!(ImageReference::as_docker_reads(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_this_machine_needs_no_tls() {
        for (text, is_here) in [
            ("localhost/app", true),
            ("localhost:5000/app", true),
            ("127.0.0.1:5000/app", true),
            ("[::1]:5000/app", true),
            ("[::1]/app", true),
            ("[2001:db8::1]:5000/app", false),
            ("localhost.example/app", false),
            ("127.0.0.1.example:5000/app", false),
        ] {
            assert_eq!(text.parse::<Repository>().unwrap().is_on_loopback(), is_here, "{text}");
        }
    }

    #[test]
    fn what_could_be_read_in_another_way_is_no_reference() {
        let long = format!("registry.example/{}", "a".repeat(300));
        for wrong in [
            "",
            "app",
            "team/app",
            "registry.example",
            "registry.example/",
            "registry.example//app",
            "registry.example/App",
            "registry.example/-app",
            "registry.example/app_",
            "registry.example/a..b",
            "registry.example/a___b",
            "registry.example/../app",
            "registry.example/app:",
            "registry.example/app:-x",
            "registry.example/app:1:2",
            "registry.example/app@sha256:../x",
            "registry.example/app@md5:00",
            "registry.example:0/app",
            "registry.example:65536/app",
            "registry.example:+80/app",
            "user:secret@registry.example/app",
            "https://registry.example/app",
            "-registry.example/app",
            "registry.example/app\n",
            "registry.example/app x",
            "registry..example/app",
            "[::1/app",
            "[localhost]:5000/app",
            &long,
        ] {
            assert_eq!(wrong.parse::<ImageReference>(), Err(NotARepository), "{wrong}");
        }
    }
}
