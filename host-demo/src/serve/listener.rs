//! Accepting connections, with limits that a crowd of silent ones does not reach.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};

/// Connections at one time, websockets among them.
const MAX_CONNECTIONS: usize = 8192;
/// A request's head has to arrive in this time; also how long an idle connection is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a client may take nothing of an answer, which takes memory.
const WRITE_LIMIT: Duration = Duration::from_secs(60);
/// Pause after the system refused a connection, for example for want of file handles.
const PAUSE: Duration = Duration::from_millis(100);

/// How many connections are served at one time where a process may have so many files open: jobs need some of them.
pub(crate) fn most_connections(n_files: u64) -> usize {
    usize::try_from(n_files / 2).map_or(MAX_CONNECTIONS, |half| half.clamp(1, MAX_CONNECTIONS))
}

/// Serves `most` connections at one time, until it is dropped.
pub(crate) async fn accept(listener: TcpListener, router: Router, most: usize) {
    let places = Arc::new(Semaphore::new(most));
    loop {
        // Never closed.
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            sleep(PAUSE).await;
            continue;
        };
        let router = router.clone();
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let stream = Placed::new(stream, place, WRITE_LIMIT);
            attend(stream, router).await;
        });
    }
}

/// A connection that keeps its place for as long as anybody has it, as a websocket outlives [`attend`], and that is not written to
/// for ever.
struct Placed<S> {
    stream: S,
    _place: OwnedSemaphorePermit,
    limit: Duration,
    /// When nothing having been taken is too long.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<S> Placed<S> {
    fn new(stream: S, place: OwnedSemaphorePermit, limit: Duration) -> Self {
        Self {
            stream,
            _place: place,
            limit,
            deadline: None,
        }
    }

    fn in_time<T>(
        &mut self,
        written: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.deadline = None;
            return written;
        }
        let limit = self.limit;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(limit)));
        deadline
            .as_mut()
            .poll(context)
            .map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Placed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Placed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.in_time(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        self.in_time(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.in_time(flushed, context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
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

#[cfg(test)]
mod tests {
    use axum::extract::ws::{WebSocket, WebSocketUpgrade};
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_websocket_has_a_place_among_the_connections() {
        let socket = |mut socket: WebSocket| async move { while socket.recv().await.is_some() {} };
        let upgrade = move |upgrade: WebSocketUpgrade| async move { upgrade.on_upgrade(socket) };
        let router = Router::new().route("/ws", get(upgrade));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(accept(listener, router, 1));
        let mut first = TcpStream::connect(address).await.unwrap();
        let key = "dGhlIHNhbXBsZSBub25jZQ==";
        let head = format!(
            "GET /ws HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: {key}\r\n\r\n"
        );
        first.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        first.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 101");
        let mut second = TcpStream::connect(address).await.unwrap();
        second
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let waited = timeout(Duration::from_millis(200), second.read_exact(&mut answer)).await;
        assert!(waited.is_err(), "served beside the websocket");
        drop(first);
        let answered = timeout(Duration::from_secs(60), second.read_exact(&mut answer)).await;
        answered.unwrap().unwrap();
        assert_eq!(&answer, b"HTTP/1.1 404");
        assert_eq!([100, 1 << 40].map(most_connections), [50, MAX_CONNECTIONS]);
    }

    #[tokio::test]
    async fn who_takes_nothing_of_an_answer_is_not_written_to_for_ever() {
        let places = Arc::new(Semaphore::new(1));
        let place = places.acquire_owned().await.unwrap();
        let (ours, mut theirs) = tokio::io::duplex(16);
        let mut placed = Placed::new(ours, place, Duration::from_millis(200));
        // Slow, but never for so long.
        let reader = async {
            for _ in 0..8 {
                sleep(Duration::from_millis(50)).await;
                theirs.read_exact(&mut [0; 16]).await.unwrap();
            }
        };
        let (written, ()) = tokio::join!(placed.write_all(&[7; 128]), reader);
        written.unwrap();
        let error = placed.write_all(&[7; 128]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
