//! The connection to the site's broker, cut.

use std::process::Command;

use kiln_service::config::Site as Config;
use kiln_tests::Result;
use kiln_tests::command::run;
use kiln_tests::site::Site;

/// How it is cut.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Cut {
    /// Nothing arrives any more, and nobody is told.
    Silent,
    /// Both ends are told at their next word.
    Reset,
}

/// Mended with this value.
pub(crate) struct Wire {
    table: String,
}

impl Wire {
    /// # Errors
    /// Where the broker's address is no port, or `nft` fails.
    pub(crate) fn cut(site: &Site, how: Cut) -> Result<Self> {
        let url = Config::load(site.home())?.nats_url;
        let port: u16 = url.rsplit(':').next().unwrap_or_default().trim_end_matches('/').parse()?;
        let wire = Self { table: format!("kiln_cut_{port}") };
        let verdict = match how {
            Cut::Silent => "drop",
            Cut::Reset => "reject with tcp reset",
        };
        let rules = format!(
            "table inet {} {{ chain out {{ type filter hook output priority 0; \
             tcp dport {port} {verdict}; tcp sport {port} {verdict}; }}; }}",
            wire.table
        );
        run(Command::new("nft").arg(rules))?;
        Ok(wire)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let _ = Command::new("nft").args(["delete", "table", "inet", &self.table]).status();
    }
}
