//! `kiln supervise`, which `kiln up` starts, and `kiln tend`.

use crate::failure::Outcome;
use crate::home::Home;
use crate::site::{self, programs, supervisor};

pub(crate) async fn run(home: &Home) -> Outcome {
    let site = site::load(home)?;
    let programs = programs::found(&site)?;
    supervisor::run(site, programs).await
}

pub(crate) async fn tend(home: &Home) -> Outcome {
    supervisor::run(site::load(home)?, Vec::new()).await
}
