//! Where it is computed: said on start, by the server and in the report; one that cannot be used is a sentence.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command};

use serde_json::{Value, json};

use crate::support::{Done, Place, done, node};

const VARIABLE: &str = "CONCEPTLOOM_DEVICE";
/// What the plugin for tests tells of devices.
const FAULTY: &str = "FAULTY_DEVICES";

fn two_cards() -> String {
    let card = |index: usize| {
        json!({
            "kind": "cuda", "index": index, "product": "Card 3000",
            "memory": {"total": 24u64 << 30, "free": 2u64 << 30, "held": 5u64 << 30, "used": 4u64 << 30},
        })
    };
    json!([card(0), card(1)]).to_string()
}

/// A graph that computes nothing: devices are opened before.
fn place(place: Place) -> Place {
    let graph = json!({
        "1": node("LoadImage", json!({"image": "demo:man-and-cat.png"})),
        "2": node("SaveImage", json!({"images": ["1", 0]})),
    });
    place.write("w.json", graph.to_string());
    place.write(
        "m.jsonl",
        json!({"id": "one", "workflow": "w.json"}).to_string(),
    );
    place
}

/// `run`, `batch` and `serve`; all of them leave their results in `out`.
const COMMANDS: [&[&str]; 3] = [
    &["run", "w.json", "--out", "out"],
    &["batch", "m.jsonl", "--out", "out"],
    &["serve", "--port", "0", "--data", "out"],
];

fn with(place: &Place, arguments: &[&str], (variable, value): (&str, &str)) -> Done {
    let mut command = place.command(arguments);
    done(command.env(variable, value).output().unwrap())
}

/// A server that is stopped when it is dropped.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(mut command: Command) -> Self {
        let mut process = command.spawn().unwrap();
        let mut line = String::new();
        let stdout = process.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line
            .strip_prefix("http://")
            .and_then(|line| line.split_once('/'));
        let address = address
            .map(|(address, _)| address.to_owned())
            .unwrap_or_default();
        Self { process, address }
    }

    fn get(&self, path: &str) -> Value {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let host = &self.address;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        let (_, body) = reply.split_once("\r\n\r\n").unwrap();
        serde_json::from_str(body).unwrap()
    }

    fn stop(mut self) -> String {
        self.process.kill().unwrap();
        let mut text = String::new();
        self.process
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        text
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn the_device_that_works_is_said_on_start_and_in_the_report() {
    let place = place(Place::with_conceptloom());
    let line = |text: &str| {
        let line = text
            .lines()
            .find(|line| line.starts_with("conceptloom computes on cpu: "));
        line.unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    for arguments in [COMMANDS[0], &["batch", "m.jsonl", "--out", "batch"]] {
        let run = with(&place, arguments, (VARIABLE, "cpu")).succeeded();
        line(&run.stderr);
    }
    let plugin = &place.json("out/run.json")["plugins"][0];
    let device = &plugin["devices"][0];
    assert_eq!(
        (&plugin["name"], &device["kind"]),
        (&json!("conceptloom"), &json!("cpu"))
    );
    let product = device["product"].as_str().unwrap();
    assert!(!product.is_empty());
    let page = String::from_utf8(place.read("out/report.html")).unwrap();
    assert!(
        page.contains("conceptloom computes on cpu: "),
        "{page:.3000}"
    );
    // Of the machine there is nothing in a batch's results.
    assert_eq!(
        place.names("batch/one").len(),
        3,
        "{:?}",
        place.names("batch/one")
    );
}

#[test]
fn the_server_says_where_it_computes() {
    let place = place(Place::with_conceptloom());
    let mut command = place.command(&["serve", "--port", "0", "--data", "data"]);
    command.env(VARIABLE, "cpu");
    let server = Server::start(command);
    let stats = server.get("/system_stats");
    let [device] = stats["devices"].as_array().unwrap().as_slice() else {
        panic!("{stats}")
    };
    assert_eq!(
        (&device["type"], &device["index"]),
        (&json!("cpu"), &json!(0))
    );
    assert!(
        device["name"].as_str().unwrap().starts_with("cpu "),
        "{device}"
    );
    assert_eq!(device["vram_total"], stats["system"]["ram_total"]);
    let said = server.stop();
    assert!(said.contains("conceptloom computes on cpu: "), "{said}");
}

#[test]
fn cards_are_named_with_their_memory() {
    let place = place(Place::with_faulty());
    let cards = (FAULTY, two_cards());
    let run = with(&place, COMMANDS[0], (cards.0, &cards.1)).succeeded();
    let told = "faulty-plugin computes on cuda:0: Card 3000, 24 GiB and cuda:1: Card 3000, 24 GiB";
    assert!(run.stderr.contains(told), "{}", run.stderr);
    let devices = &place.json("out/run.json")["plugins"][0]["devices"];
    let second = json!({"kind": "cuda", "index": 1, "product": "Card 3000", "memory": 24u64 << 30});
    assert_eq!(devices[1], second);
    let mut command = place.command(&["serve", "--port", "0", "--data", "data"]);
    command.env(cards.0, &cards.1);
    let server = Server::start(command);
    let stats = server.get("/api/system_stats");
    assert_eq!(stats["devices"].as_array().unwrap().len(), 2);
    // What the plugin keeps without using it can be used again.
    let second = json!({
        "name": "cuda:1 Card 3000", "type": "cuda", "index": 1, "vram_total": 24u64 << 30, "vram_free": 3u64 << 30,
        "torch_vram_total": 5u64 << 30, "torch_vram_free": 1u64 << 30,
    });
    assert_eq!(stats["devices"][1], second);
}

#[test]
fn a_device_that_cannot_be_used_is_one_sentence_and_nothing_runs() {
    let place = place(Place::with_conceptloom());
    for (name, parts) in [
        (
            "cuda:0",
            [
                "cannot compute: CONCEPTLOOM_DEVICE is cuda:0",
                "set it to cpu",
            ],
        ),
        (
            "gpu",
            [
                "cannot compute: CONCEPTLOOM_DEVICE is \"gpu\"",
                "it can be cpu",
            ],
        ),
    ] {
        for arguments in COMMANDS {
            with(&place, arguments, (VARIABLE, name)).failed_with(&parts);
        }
        // What does not compute works all the same.
        with(&place, &["validate", "w.json"], (VARIABLE, name)).succeeded();
        with(&place, &["nodes"], (VARIABLE, name)).succeeded();
    }
    assert!(!place.path().join("out/one").exists());
    assert!(!place.path().join("out/report.html").exists());
}

#[test]
fn a_plugin_that_fails_over_its_devices_is_one_sentence() {
    let place = place(Place::with_faulty());
    for (told, parts) in [
        (
            "panic",
            ["the plugin faulty-plugin cannot compute", "panicked"],
        ),
        (
            "the card is on fire; call for help",
            ["faulty-plugin cannot compute", "on fire"],
        ),
    ] {
        for arguments in COMMANDS {
            with(&place, arguments, (FAULTY, told)).failed_with(&parts);
        }
    }
}
