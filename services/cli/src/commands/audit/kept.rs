//! Heads of the chains of audit records that somebody kept, as `kiln audit verify` prints them.

use std::fmt;
use std::str::FromStr;

use kiln_api::audit::Link;
use kiln_model::digest::Digest;

use super::Keeper;

/// `builder=41:sha256:…`; 0 where there was no record yet.
#[derive(Debug, Clone)]
pub(super) struct KeptHead {
    pub(super) keeper: Keeper,
    pub(super) link: Link,
}

impl FromStr for KeptHead {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is no head such as builder=41:sha256:…, as kiln audit verify prints it");
        let (keeper, link) = text.split_once('=').ok_or_else(wrong)?;
        let (sequence, hash) = link.split_once(':').ok_or_else(wrong)?;
        let keeper = Keeper::ALL.into_iter().find(|it| it.as_str() == keeper).ok_or_else(|| {
            format!("{keeper} keeps no audit records: {} do", Keeper::ALL.map(Keeper::as_str).join(", "))
        })?;
        let sequence = sequence.parse().map_err(|_| wrong())?;
        let hash: Digest = hash.parse().map_err(|error| format!("{error}"))?;
        Ok(Self { keeper, link: Link { sequence, hash: hash.to_string() } })
    }
}

impl fmt::Display for KeptHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}:{}", self.keeper.as_str(), self.link.sequence, self.link.hash)
    }
}

#[cfg(test)]
mod tests {
    use kiln_model::event::Service;

    use super::*;

    #[test]
    fn a_head_is_taken_as_it_is_printed_and_nothing_else_is() {
        let hash = Digest::of(b"a chain").to_string();
        let text = format!("builder=41:{hash}");
        let head: KeptHead = text.parse().unwrap();
        assert_eq!(
            (head.keeper, head.link.sequence, &head.link.hash),
            (Keeper::Service(Service::Builder), 41, &hash)
        );
        assert_eq!(head.to_string(), text);
        assert_eq!(format!("site=7:{hash}").parse::<KeptHead>().unwrap().keeper, Keeper::Site);
        assert_eq!(format!("monitor=0:{hash}").parse::<KeptHead>().unwrap().link.sequence, 0);
        for (wrong, words) in [
            (String::new(), "no head"),
            ("builder".to_owned(), "no head"),
            ("builder=41".to_owned(), "no head"),
            (format!("builder=:{hash}"), "no head"),
            (format!("builder=-1:{hash}"), "no head"),
            (format!("builder={hash}"), "no head"),
            (
                format!("console=41:{hash}"),
                "keeps no audit records: builder, deployer, monitor, node, site do",
            ),
            (format!("=41:{hash}"), "keeps no audit records"),
            ("builder=41:sha256:ab".to_owned(), "not a digest"),
            ("builder=41:".to_owned(), "not a digest"),
        ] {
            let refused = wrong.parse::<KeptHead>().unwrap_err();
            assert!(refused.contains(words), "{wrong}: {refused}");
        }
    }
}
