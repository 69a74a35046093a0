//! The word to stop, from the signals that a process gets.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// True from the first SIGTERM or SIGINT on.
///
/// # Errors
/// Where the handlers can't be set.
pub fn on_signal() -> std::io::Result<watch::Receiver<bool>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("told to stop");
        stop.send_replace(true);
        // Kept for as long as anyone listens: a sender that is gone would read as an end of its own.
        stop.closed().await;
    });
    Ok(stopped)
}

/// Resolves when it is time to stop; also where whoever would say so is gone.
pub async fn requested(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}
