//! Accepting connections, with limits that a crowd of silent ones does not reach.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Connections at one time.
const MAX_CONNECTIONS: usize = 8192;
/// A request's head has to arrive in this time; also how long an idle connection is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after the system refused a connection, for example for want of file handles.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves connections until it is dropped.
pub(crate) async fn accept(listener: TcpListener, router: Router) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Never closed.
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let router = router.clone();
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            attend(stream, router).await;
            drop(place);
        });
    }
}

/// Answers what comes over one connection, until it ends or becomes a websocket.
pub(crate) async fn attend<S>(stream: S, router: Router)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // HTTP/1.1 only: an HTTP/2 connection would know no such timeout, and no host in its head.
    let mut builder = Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        // Who has said all that he has to say still listens.
        .half_close(true);
    // How a connection ended is its client's affair.
    let _ = builder
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .with_upgrades()
        .await;
}
