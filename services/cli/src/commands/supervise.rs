//! `kiln supervise`, which `kiln up` starts.

use crate::failure::Outcome;
use crate::home::Home;
use crate::site::{self, supervisor};

pub(crate) async fn run(home: &Home) -> Outcome {
    supervisor::run(site::load(home)?).await
}
