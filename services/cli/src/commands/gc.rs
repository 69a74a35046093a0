//! `kiln gc`

use clap::Args;
use kiln_api::builder::CollectRequest;

use crate::clients::{Services, request_id};
use crate::failure::{During as _, Outcome};
use crate::json;
use crate::screen::{Screen, plain};
use crate::words::size;

#[derive(Debug, Args)]
pub(crate) struct Gc {
    /// Only show what would be removed
    #[arg(long)]
    dry_run: bool,
}

pub(crate) async fn run(it: &Gc, services: &Services, screen: Screen) -> Outcome {
    let what = "removing what nobody needs";
    let bar = screen.bar(0);
    bar.message(what);
    let request = CollectRequest { request_id: request_id(), dry_run: it.dry_run };
    let answer = services.builder().collect(request).await.during(what)?.into_inner();
    drop(bar);
    screen.json(&json::of("kiln.builder.v1.CollectResponse", &answer)?)?;
    let found: Vec<_> = answer.collected.iter().filter(|it| it.count > 0 || it.bytes > 0).collect();
    if found.is_empty() {
        screen.line("Nothing: all that is kept is in use, held, or too young.")?;
        return screen.next(&["kiln status"]);
    }
    let rows = found.iter().map(|it| vec![plain(&it.what), plain(it.count), plain(size(it.bytes))]);
    screen.table(&["WHAT", "COUNT", "SIZE"], rows.collect())?;
    let freed = size(found.iter().map(|it| it.bytes).sum());
    if it.dry_run {
        screen.line(format_args!("{freed} would be freed"))?;
        return screen.next(&["kiln gc"]);
    }
    screen.line(format_args!("{freed} freed"))
}
