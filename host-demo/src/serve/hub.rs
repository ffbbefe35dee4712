//! Who is connected, and what they are sent: frames of ComfyUI's websocket protocol.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::Bytes;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// Frames that wait for a slow client; one that falls further behind is cut off and may connect again.
const MAX_WAITING: usize = 2048;

/// A frame as it goes out.
#[derive(Debug, Clone)]
pub(crate) enum Frame {
    Text(String),
    Binary(Bytes),
}

/// What a client said that it understands.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Features {
    /// That it spoke at all: it tells frames apart, and results from what nodes show on the way.
    pub(crate) announced: bool,
    /// Previews that name their node.
    pub(crate) preview_metadata: bool,
    /// Lines under a node that name their prompt.
    pub(crate) progress_text_metadata: bool,
}

/// Something to tell.
#[derive(Debug)]
pub(crate) enum Message<'a> {
    /// `{"type", "data"}`.
    Event(&'a str, Value),
    /// The same, of what a node shows that is no output: clients that take the first `executed` for the result would be
    /// wrong, so it goes to those that announced what they understand.
    OnTheWay(&'a str, Value),
    /// A JPEG picture on a node, for those that announced previews; for all if the job asked for them. Old clients take
    /// any binary frame for the result.
    Preview {
        asked: bool,
        node: &'a str,
        prompt_id: &'a str,
        jpeg: &'a [u8],
    },
    /// A line of text under a node, for those that announced what they understand.
    Text {
        node: &'a str,
        prompt_id: &'a str,
        text: &'a str,
    },
}

struct Client {
    connection: u64,
    sender: mpsc::Sender<Frame>,
    features: Features,
}

/// All clients, by the id that they chose.
#[derive(Default)]
pub(crate) struct Hub {
    clients: Mutex<HashMap<String, Client>>,
    connections: AtomicU64,
}

impl Hub {
    /// Takes a client in; an older connection of the same id is replaced. Returns the connection's number and what it
    /// is to be sent.
    pub(crate) fn connect(&self, id: &str) -> (u64, mpsc::Receiver<Frame>) {
        let (sender, receiver) = mpsc::channel(MAX_WAITING);
        let connection = self.connections.fetch_add(1, Ordering::Relaxed);
        let client = Client {
            connection,
            sender,
            features: Features::default(),
        };
        self.clients.lock().insert(id.to_owned(), client);
        (connection, receiver)
    }

    /// Forgets a connection, unless a newer one took its place.
    pub(crate) fn disconnect(&self, id: &str, connection: u64) {
        let mut clients = self.clients.lock();
        if clients
            .get(id)
            .is_some_and(|client| client.connection == connection)
        {
            clients.remove(id);
        }
    }

    /// Remembers what a client understands.
    pub(crate) fn set_features(&self, id: &str, features: Features) {
        if let Some(client) = self.clients.lock().get_mut(id) {
            client.features = features;
        }
    }

    /// Sends to one client, or to all if `to` is empty. Any thread; does not block.
    pub(crate) fn send(&self, to: &str, message: &Message<'_>) {
        let mut clients = self.clients.lock();
        let is_reached = |id: &String, client: &Client| {
            let is_meant = to.is_empty() || id == to;
            !is_meant || deliver(client, message)
        };
        clients.retain(|id, client| is_reached(id, client));
    }
}

/// Whether the client keeps up.
fn deliver(client: &Client, message: &Message<'_>) -> bool {
    let is_wanted = match message {
        Message::Event(..) => true,
        Message::Preview { asked, .. } => *asked || client.features.preview_metadata,
        Message::OnTheWay(..) | Message::Text { .. } => client.features.announced,
    };
    if !is_wanted {
        return true;
    }
    let can_skip = matches!(message, Message::Preview { .. });
    if can_skip && client.sender.capacity() < MAX_WAITING / 2 {
        return true;
    }
    client
        .sender
        .try_send(encode(message, client.features))
        .is_ok()
}

/// Tags and lengths are big-endian `u32`.
fn encode(message: &Message<'_>, features: Features) -> Frame {
    const PREVIEW: u32 = 1;
    const TEXT: u32 = 3;
    const PREVIEW_WITH_METADATA: u32 = 4;
    const JPEG: u32 = 1;
    let mut bytes = Vec::new();
    let part = |bytes: &mut Vec<u8>, part: &[u8]| {
        // A node's id and a prompt's are short.
        bytes.extend((part.len() as u32).to_be_bytes());
        bytes.extend(part);
    };
    match *message {
        Message::Event(kind, ref data) | Message::OnTheWay(kind, ref data) => {
            return Frame::Text(json!({"type": kind, "data": data}).to_string());
        }
        Message::Preview {
            node,
            prompt_id,
            jpeg,
            ..
        } if features.preview_metadata => {
            let about = json!({
                "node_id": node, "display_node_id": node, "parent_node_id": node, "real_node_id": node,
                "prompt_id": prompt_id, "image_type": "image/jpeg",
            });
            bytes.extend(PREVIEW_WITH_METADATA.to_be_bytes());
            part(&mut bytes, about.to_string().as_bytes());
            bytes.extend(jpeg);
        }
        Message::Preview { jpeg, .. } => {
            bytes.extend(PREVIEW.to_be_bytes());
            bytes.extend(JPEG.to_be_bytes());
            bytes.extend(jpeg);
        }
        Message::Text {
            node,
            prompt_id,
            text,
        } => {
            bytes.extend(TEXT.to_be_bytes());
            if features.progress_text_metadata {
                part(&mut bytes, prompt_id.as_bytes());
            }
            part(&mut bytes, node.as_bytes());
            bytes.extend(text.as_bytes());
        }
    }
    Frame::Binary(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binary(message: &Message<'_>, features: Features) -> Vec<u8> {
        match encode(message, features) {
            Frame::Binary(bytes) => bytes.to_vec(),
            Frame::Text(text) => panic!("{text}"),
        }
    }

    #[test]
    fn frames_are_laid_out_as_the_editor_reads_them() {
        let text = Message::Text {
            node: "12",
            prompt_id: "ab",
            text: "step",
        };
        let plain = binary(&text, Features::default());
        assert_eq!(plain, b"\0\0\0\x03\0\0\0\x0212step");
        let features = Features {
            announced: true,
            preview_metadata: true,
            progress_text_metadata: true,
        };
        assert_eq!(
            binary(&text, features),
            b"\0\0\0\x03\0\0\0\x02ab\0\0\0\x0212step"
        );
        let preview = Message::Preview {
            asked: false,
            node: "12",
            prompt_id: "ab",
            jpeg: b"JPEG",
        };
        assert_eq!(
            binary(&preview, Features::default()),
            b"\0\0\0\x01\0\0\0\x01JPEG"
        );
        let named = binary(&preview, features);
        let length = u32::from_be_bytes(named[4..8].try_into().unwrap()) as usize;
        let about: Value = serde_json::from_slice(&named[8..8 + length]).unwrap();
        assert_eq!(
            (&named[..4], &named[8 + length..]),
            (&b"\0\0\0\x04"[..], &b"JPEG"[..])
        );
        assert_eq!(
            (&about["node_id"], &about["image_type"]),
            (&json!("12"), &json!("image/jpeg"))
        );
    }

    #[test]
    fn a_message_goes_to_its_client_or_to_all_and_a_newer_connection_takes_over() {
        let hub = Hub::default();
        let (first, mut old) = hub.connect("a");
        let (_, mut new) = hub.connect("a");
        let (_, mut other) = hub.connect("b");
        hub.disconnect("a", first);
        hub.send("a", &Message::Event("x", json!(1)));
        hub.send("", &Message::Event("y", json!(2)));
        let count = |receiver: &mut mpsc::Receiver<Frame>| {
            std::iter::from_fn(|| receiver.try_recv().ok()).count()
        };
        assert_eq!(
            (count(&mut old), count(&mut new), count(&mut other)),
            (0, 2, 1)
        );
    }

    #[test]
    fn a_client_that_does_not_read_is_cut_off_and_previews_stop_first() {
        let hub = Hub::default();
        let (_, mut slow) = hub.connect("a");
        let preview = Message::Preview {
            asked: false,
            node: "1",
            prompt_id: "",
            jpeg: b"",
        };
        for _ in 0..2 * MAX_WAITING {
            hub.send("a", &preview);
        }
        assert!(slow.len() <= MAX_WAITING / 2 + 1);
        for _ in 0..2 * MAX_WAITING {
            hub.send("a", &Message::Event("x", json!(1)));
        }
        while slow.try_recv().is_ok() {}
        assert!(slow.is_closed());
    }

    #[test]
    fn clients_are_sent_what_they_understand() {
        let hub = Hub::default();
        let (_, mut old) = hub.connect("old");
        let (_, mut new) = hub.connect("new");
        let features = Features {
            announced: true,
            preview_metadata: true,
            progress_text_metadata: false,
        };
        hub.set_features("new", features);
        let preview = |asked| Message::Preview {
            asked,
            node: "1",
            prompt_id: "p",
            jpeg: b"JPEG",
        };
        let text = Message::Text {
            node: "1",
            prompt_id: "p",
            text: "step",
        };
        let way = Message::OnTheWay("executed", json!({}));
        for message in [preview(false), text, way] {
            hub.send("", &message);
            assert!(old.try_recv().is_err(), "{message:?}");
            assert!(new.try_recv().is_ok(), "{message:?}");
        }
        for message in [preview(true), Message::Event("executed", json!({}))] {
            hub.send("", &message);
            assert!(
                old.try_recv().is_ok() && new.try_recv().is_ok(),
                "{message:?}"
            );
        }
    }
}
