//! `kiln doctor`

use crate::failure::{Code, Failure, Outcome};
use crate::home::Home;
use crate::screen::Screen;
use crate::site::doctor;

pub(crate) async fn run(home: &Home, screen: Screen) -> Outcome {
    let report = doctor::examine(home).await?;
    screen.json(&report.document())?;
    report.show(screen, false)?;
    if !report.is_good() {
        return Err(Failure::Shown(Code::Refused));
    }
    screen.line("\nThis machine can run instances.")?;
    if home.exists() { Ok(()) } else { screen.next(&["kiln up"]) }
}
