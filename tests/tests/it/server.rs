//! A server under test, asked by hand.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command};

use serde_json::{Value, json};

/// A server that is ended with the test.
pub(crate) struct Server {
    pub(crate) child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts it, as [`Self::of`].
    pub(crate) fn start(command: &mut Command) -> Result<Self, Child> {
        Self::of(command.spawn().unwrap())
    }

    /// Waits for its address; gives back the process of one that ends without.
    pub(crate) fn of(mut child: Child) -> Result<Self, Child> {
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let address = line.strip_prefix("http://");
        match address.and_then(|address| address.split('/').next()) {
            Some(address) => Ok(Self {
                child,
                address: address.to_owned(),
            }),
            None => Err(child),
        }
    }

    /// The status and the JSON of an answer; an error if none came, as from a server that is gone.
    pub(crate) fn send(
        &self,
        method: &str,
        path: &str,
        media_type: &str,
        body: &[u8],
    ) -> io::Result<(u16, Value)> {
        let mut stream = TcpStream::connect(&self.address)?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: {media_type}\r\ncontent-length: {}\r\n\
             connection: close\r\n\r\n",
            self.address,
            body.len()
        )?;
        stream.write_all(body)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer);
        let cut = || io::Error::other("no answer");
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(cut)?;
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        // A body may come in chunks, whose sizes stand between them.
        let json = body.find('{').zip(body.rfind('}'));
        let json = json.and_then(|(start, end)| serde_json::from_str(body.get(start..=end)?).ok());
        Ok((status.ok_or_else(cut)?, json.unwrap_or_default()))
    }

    /// Queues a graph; its id once it is accepted.
    pub(crate) fn submit(&self, graph: &Value) -> io::Result<Option<String>> {
        let body = json!({"prompt": graph}).to_string();
        let (_, answer) = self.send("POST", "/api/prompt", "application/json", body.as_bytes())?;
        Ok(answer["prompt_id"].as_str().map(str::to_owned))
    }

    /// Whether nothing runs and nothing waits.
    pub(crate) fn is_idle(&self) -> io::Result<bool> {
        let (_, queue) = self.send("GET", "/api/queue", "application/json", b"")?;
        let mut parts = ["queue_running", "queue_pending"].iter();
        Ok(parts.all(|part| queue[part].as_array().is_some_and(Vec::is_empty)))
    }
}
