//! The server without a network and without a worker: bytes in, bytes out, for [`fuzzing`](crate::fuzzing).

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex, split};
use tokio::runtime::{Builder, Runtime};

use super::Server;
use super::folders::Folders;
use super::front_end::FrontEnd;
use super::guard::Guard;
use super::hub::Hub;
use super::journal::Journal;
use super::listener::attend;
use super::queue::Queue;
use super::routes::router;
use super::settings::Settings;
use crate::catalog::Catalog;

/// The token of the server that asks for one.
const TOKEN: &str = "0123456789abcdef";
/// What one connection has on its way.
const PIPE: usize = 64 << 10;
/// Nothing that is small takes so long.
const LIMIT: Duration = Duration::from_secs(120);

/// How [`talk`] went.
pub(crate) enum Talk {
    /// No server starts on this folder, for this reason.
    Refused(String),
    /// What the server said.
    Answered(Vec<u8>),
}

/// A runtime for [`talk`].
///
/// # Errors
/// The system refuses its threads.
pub(crate) fn runtime() -> anyhow::Result<Runtime> {
    let mut builder = Builder::new_current_thread();
    builder.max_blocking_threads(2).enable_all();
    builder
        .build()
        .context("the server's threads cannot be started")
}

/// Sends all of `sent` to a new server over one connection and returns what comes back; then starts a server on what that one
/// left. Bytes that hold [`TOKEN`] meet a server that asks for it.
///
/// # Errors
/// A server that does not end the connection, or cannot be started again.
pub(crate) fn talk(
    runtime: &Runtime,
    catalog: &Arc<Catalog>,
    data: &Path,
    sent: &[u8],
) -> anyhow::Result<Talk> {
    let token = sent
        .windows(TOKEN.len())
        .any(|part| part == TOKEN.as_bytes())
        .then_some(TOKEN);
    let open = || open(catalog, data, token);
    let server = match open() {
        Ok(server) => server,
        Err(error) => return Ok(Talk::Refused(format!("{error:#}"))),
    };
    let answer = runtime.block_on(async {
        let (client, stream) = duplex(PIPE);
        let (mut reader, mut writer) = split(client);
        let serving = tokio::spawn(attend(stream, router(server.clone())));
        let sending = async {
            // A server that has heard enough closes its end.
            let _ = writer.write_all(sent).await;
            let _ = writer.shutdown().await;
        };
        let mut answer = Vec::new();
        let talked = tokio::time::timeout(LIMIT, async {
            tokio::join!(sending, reader.read_to_end(&mut answer)).1
        });
        talked
            .await
            .context("the connection did not end")?
            .context("the connection broke")?;
        serving.await.context("the connection's task failed")?;
        anyhow::Ok(answer)
    })?;
    let n_waiting = server.queue.remaining();
    drop(server);
    let again = open().context("the server left what it cannot start from")?;
    ensure!(
        again.queue.remaining() == n_waiting,
        "{n_waiting} jobs were accepted, {} are there after a new start",
        again.queue.remaining()
    );
    again.queue.remove_waiting(|_| true);
    Ok(Talk::Answered(answer))
}

fn open(catalog: &Arc<Catalog>, data: &Path, token: Option<&str>) -> anyhow::Result<Arc<Server>> {
    let listen = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let front_end = FrontEnd::none();
    let folders = Arc::new(Folders::open(data)?);
    let settings = Settings::open(&folders.user, front_end.version())?;
    let (journal, restored) = Journal::open(&folders.journal())?;
    Ok(Arc::new(Server {
        catalog: catalog.clone(),
        folders,
        front_end,
        guard: Guard::new(listen, token, Vec::new())?,
        hub: Arc::<Hub>::default(),
        queue: Queue::new(journal, restored),
        settings,
        disable_metadata: false,
    }))
}
