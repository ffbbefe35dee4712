//! `/ws`: the connection on which a client hears of its jobs.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{Message as WsMessage, WebSocket, WebSocketUpgrade};
use axum::extract::{Query, State};
use axum::response::Response;
use futures_util::{Sink, SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::time::timeout;
use uuid::Uuid;

use super::super::Server;
use super::super::hub::{Features, Frame, Message};
use super::info::server_features;

/// Clients send little.
const MAX_MESSAGE: usize = 64 << 10;
/// Bytes that are read at once; every client has them.
const READ_BUFFER: usize = 4 << 10;
/// How long a client may take nothing of what it is sent; what waits for it takes memory.
const SEND_LIMIT: Duration = Duration::from_secs(60);
/// How long a client may take none of the frame that says that no more come.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// Longest id that a client may choose.
const MAX_ID: usize = 128;

/// `GET /ws?clientId=`: with the id of an earlier connection, it goes on.
pub(crate) async fn connect(
    State(server): State<Arc<Server>>,
    Query(query): Query<HashMap<String, String>>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let id = query
        .get("clientId")
        .filter(|id| !id.is_empty() && id.len() <= MAX_ID);
    let id = id
        .cloned()
        .unwrap_or_else(|| Uuid::new_v4().simple().to_string());
    upgrade
        .max_message_size(MAX_MESSAGE)
        .max_frame_size(MAX_MESSAGE)
        .read_buffer_size(READ_BUFFER)
        .on_upgrade(move |socket| attend(server, socket, id))
}

async fn attend(server: Arc<Server>, socket: WebSocket, id: String) {
    let (connection, mut frames) = server.hub.connect(&id);
    let mut status = server.status();
    status["sid"] = json!(id);
    server.hub.send(&id, &Message::Event("status", status));
    if let Some(live) = server.queue.running().and_then(|running| running.live) {
        live.catch_up(&id);
    }
    let (mut sink, mut stream) = socket.split();
    loop {
        tokio::select! {
            frame = frames.recv() => {
                // The hub lets go of a client that is replaced or does not keep up.
                let Some(frame) = frame else { break };
                let frame = match frame {
                    Frame::Text(text) => WsMessage::Text(text.into()),
                    Frame::Binary(bytes) => WsMessage::Binary(bytes),
                };
                if !send(&mut sink, frame, SEND_LIMIT).await {
                    break;
                }
            }
            message = stream.next() => match message {
                Some(Ok(WsMessage::Text(text))) => hear(&server, &id, &text),
                Some(Ok(WsMessage::Close(_)) | Err(_)) | None => break,
                Some(Ok(_)) => {}
            },
        }
    }
    server.hub.disconnect(&id, connection);
    // Else a client that is let go of, or that waits for the answer to its own, takes it for a broken connection.
    let _ = timeout(CLOSE_LIMIT, sink.close()).await;
}

/// Whether the frame went out.
async fn send<S>(sink: &mut S, frame: WsMessage, limit: Duration) -> bool
where
    S: Sink<WsMessage> + Unpin,
{
    matches!(timeout(limit, sink.send(frame)).await, Ok(Ok(())))
}

/// Clients say what they understand; nothing else is expected.
fn hear(server: &Server, id: &str, text: &str) {
    let Ok(message) = lenient_json::from_str::<Value>(text) else {
        return;
    };
    if message["type"] != "feature_flags" {
        return;
    }
    let can = |name: &str| message["data"][name].as_bool().unwrap_or_default();
    let features = Features {
        announced: true,
        preview_metadata: can("supports_preview_metadata"),
        progress_text_metadata: can("supports_progress_text_metadata"),
    };
    server.hub.set_features(id, features);
    server
        .hub
        .send(id, &Message::Event("feature_flags", server_features()));
}

#[cfg(test)]
mod tests {
    use futures_util::sink::{drain, unfold};

    use super::*;

    #[tokio::test]
    async fn who_takes_nothing_is_not_waited_for() {
        let frame = || WsMessage::Text("a".into());
        let limit = Duration::from_millis(20);
        assert!(send(&mut drain(), frame(), limit).await);
        let take = |(), _: WsMessage| std::future::pending::<Result<(), axum::Error>>();
        let mut never = Box::pin(unfold((), take));
        // The first one is on its way for ever, and the second waits for it.
        assert!(!send(&mut never, frame(), limit).await);
        assert!(!send(&mut never, frame(), limit).await);
    }
}
