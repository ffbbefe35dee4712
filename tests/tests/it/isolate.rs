//! `--isolate`: a node that takes its process down loses its job and nothing else.
#![cfg(unix)]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Place, done, interrupt, node, wait_for};

/// A picture through the node of many habits into a file.
fn through_hazard(habit: &str) -> Value {
    json!({
        "1": node("LoadImage", json!({"image": "demo:man-and-cat.png"})),
        "2": node("Hazard", json!({"images": ["1", 0], "habit": habit})),
        "3": node("SaveImage", json!({"images": ["2", 0]})),
    })
}

#[test]
fn a_run_ends_with_the_node_that_took_its_process_down() {
    for (habit, how) in [
        ("abort", "abort"),
        ("segfault", "segmentation fault"),
        ("exit", "its process ended with exit code 0"),
        ("hang", "no sign of life for 3 s"),
    ] {
        let place = Place::with_faulty();
        let workflow = through_hazard(habit);
        let done = place.run(&workflow, &["--isolate", "--hang-limit", "3"]);
        done.failed_with(&[
            "PluginCrashed: node 2 (Hazard)",
            how,
            "only this job is lost",
        ]);
        // What nodes kept to go on from stays, as after Ctrl-C.
        assert_eq!(place.names("."), [".work", "workflow.json"], "{habit}");
    }
}

#[test]
fn a_node_that_takes_all_memory_is_named() {
    let place = Place::with_faulty();
    place.write("w.json", through_hazard("memory").to_string());
    let host = place.command(&["run", "w.json", "--isolate", "--out", "out"]);
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -v 3000000; exec \"$0\" \"$@\""])
        .arg(host.get_program())
        .args(host.get_args())
        .current_dir(place.path());
    for (name, value) in host.get_envs() {
        command.env(name, value.unwrap());
    }
    let done = done(command.output().unwrap());
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    let told = "error: PluginCrashed: node 2 (Hazard) took its process down: ";
    assert!(done.sentence().starts_with(told), "{}", done.stderr);
}

#[test]
fn an_isolated_run_leaves_what_any_run_leaves() {
    let workflow = json!({
        "1": node("Slow", json!({"steps": 12, "prompts": "a\nb"})),
        "2": node("SaveImage", json!({"images": ["1", 0]})),
        "3": node("MaskToImage", json!({"mask": ["1", 1]})),
        "4": node("PreviewImage", json!({"images": ["3", 0]})),
    });
    let left = |more: &[&str]| {
        let place = Place::with_faulty();
        place.run(&workflow, more).succeeded();
        let mut record = place.json("out/run.json");
        // Times differ from run to run, and the folder is another.
        let without_times = |events: &Value| -> Vec<Value> {
            let events = events.as_array().unwrap().iter().cloned();
            events
                .map(|mut event| {
                    let event = event.as_object_mut().unwrap();
                    event.remove("seconds");
                    event.remove("took");
                    Value::Object(event.clone())
                })
                .collect()
        };
        let events = without_times(&record["events"]);
        let pictures: Vec<_> = place
            .names("out")
            .into_iter()
            .filter(|name| name.ends_with(".png"))
            .map(|name| (name.clone(), place.read(&format!("out/{name}"))))
            .collect();
        assert!(!pictures.is_empty() && events.len() > 10, "{events:#?}");
        (
            place.names("out"),
            events,
            record["metrics"].take(),
            pictures,
        )
    };
    assert_eq!(left(&["--isolate"]), left(&[]));
}

#[test]
fn an_error_of_an_isolated_node_is_its_own() {
    let place = Place::with_faulty();
    let workflow = json!({"1": node("Fail", json!({"code": "invalid_input"}))});
    let done = place.run(&workflow, &["--isolate"]);
    done.failed_with(&["node 1 (Fail), input code: the code is one that fails"]);
}

#[test]
fn ctrl_c_stops_an_isolated_node_within_a_step() {
    let place = Place::with_faulty();
    let workflow = json!({
        "1": node("Slow", json!({"steps": 60, "wait": 50})),
        "2": node("SaveImage", json!({"images": ["1", 0]})),
    });
    place.write("w.json", workflow.to_string());
    let mut child = place
        .command(&["run", "w.json", "--isolate"])
        .spawn()
        .unwrap();
    wait_for(&mut child, "counting 1/60");
    std::thread::sleep(Duration::from_millis(400));
    interrupt(&child);
    let ended = done(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    assert_eq!(
        ended.sentence(),
        "canceled at node 1 (Slow); nothing was written; the same command goes on where it stopped"
    );
    let again = place.host(&["run", "w.json", "--isolate"]).succeeded();
    assert!(again.stderr.contains("goes on at step"), "{}", again.stderr);
}

/// A server that is ended with the test.
struct Server {
    child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(place: &Place) -> Self {
        Self::with(place, &["--isolate", "--hang-limit", "3"], "")
    }

    fn with(place: &Place, more: &[&str], habit: &str) -> Self {
        let mut command = place.command(&[&["serve", "--port", "0"], more].concat());
        command.env("FAULTY_HABIT", habit);
        Self::of(command)
    }

    fn of(mut command: Command) -> Self {
        let mut child = command
            .stderr(std::process::Stdio::inherit())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let address = line.strip_prefix("http://").unwrap();
        let address = address.split('/').next().unwrap().to_owned();
        Self { child, address }
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Value {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             connection: close\r\n\r\n{body}",
            self.address,
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        // A body may come in chunks, whose sizes stand between them.
        let start = body.find('{').unwrap();
        let end = body.rfind('}').unwrap();
        serde_json::from_str(&body[start..=end]).unwrap_or_else(|error| panic!("{error}: {answer}"))
    }

    fn submit(&self, workflow: &Value) -> String {
        let body = json!({"prompt": workflow}).to_string();
        let answer = self.ask("POST", "/api/prompt", &body);
        answer["prompt_id"]
            .as_str()
            .unwrap_or_else(|| panic!("{answer}"))
            .to_owned()
    }

    /// The job as the history has it.
    fn wait(&self, id: &str) -> Value {
        let started = Instant::now();
        loop {
            let history = self.ask("GET", &format!("/api/history/{id}"), "");
            if let Some(job) = history.get(id) {
                return job.clone();
            }
            assert!(
                started.elapsed() < Duration::from_secs(300),
                "{id} does not end"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn a_server_loses_the_job_that_crashes_and_goes_on() {
    let place = Place::with_faulty();
    let server = Server::start(&place);
    let habits = ["", "abort", "segfault", "hang", "exit", ""];
    let ids: Vec<_> = habits
        .iter()
        .map(|habit| server.submit(&through_hazard(habit)))
        .collect();
    for (habit, id) in habits.iter().zip(&ids) {
        let status = &server.wait(id)["status"];
        let messages = status["messages"].as_array().unwrap();
        let (kind, data) = messages
            .iter()
            .map(|message| (message[0].as_str().unwrap(), &message[1]))
            .next_back()
            .unwrap();
        if habit.is_empty() {
            assert_eq!(
                (&status["status_str"], kind),
                (&json!("success"), "execution_success")
            );
            continue;
        }
        assert_eq!(
            (&status["status_str"], kind),
            (&json!("error"), "execution_error"),
            "{habit}"
        );
        let told = ["exception_type", "node_id", "node_type"].map(|key| &data[key]);
        assert_eq!(told, ["PluginCrashed", "2", "Hazard"], "{habit}");
    }
    assert_eq!(place.names("conceptloom-data/output").len(), 2);
}

#[test]
fn an_isolated_job_is_kept_when_the_server_is_stopped() {
    use std::os::unix::process::CommandExt as _;
    let slow = json!({
        "1": node("Slow", json!({"steps": 10_000, "wait": 20})),
        "2": node("SaveImage", json!({"images": ["1", 0]})),
    });
    // By a service manager, which asks all of its processes to end; and at a node that does not hear it.
    for (workflow, is_group) in [(slow, true), (through_hazard("hang"), false)] {
        let place = Place::with_faulty();
        let arguments = ["serve", "--port", "0", "--isolate", "--hang-limit", "2"];
        let mut command = place.command(&arguments);
        command.process_group(0);
        let server = Server::of(command);
        let id = server.submit(&workflow);
        let running = || server.ask("GET", "/api/queue", "")["queue_running"].clone();
        while running() == json!([]) {
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_millis(500));
        let process = i64::from(server.child.id());
        let whom = if is_group { -process } else { process };
        let status = Command::new("kill")
            .args(["-TERM", "--", &whom.to_string()])
            .status();
        assert!(status.unwrap().success());
        let mut server = server;
        server.child.wait().unwrap();
        let next = Server::start(&place);
        let waiting = next.ask("GET", "/api/queue", "")["queue_pending"].clone();
        assert_eq!(waiting[0][1], json!(id), "{waiting}");
    }
}

#[test]
fn an_isolated_job_can_be_canceled() {
    let place = Place::with_faulty();
    let server = Server::start(&place);
    let id = server.submit(&json!({
        "1": node("Slow", json!({"steps": 10_000, "wait": 20})),
        "2": node("SaveImage", json!({"images": ["1", 0]})),
    }));
    std::thread::sleep(Duration::from_secs(1));
    server.ask("POST", &format!("/api/jobs/{id}/cancel"), "{}");
    let messages = server.wait(&id)["status"]["messages"].clone();
    let last = messages.as_array().unwrap().last().unwrap().clone();
    assert_eq!(
        (&last[0], &last[1]["node_id"]),
        (&json!("execution_interrupted"), &json!("1"))
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_host_that_isolates_has_no_library_in_itself() {
    let place = Place::with_faulty();
    let has_library = |server: &Server| {
        let maps = format!("/proc/{}/maps", server.child.id());
        std::fs::read_to_string(maps)
            .unwrap()
            .contains("faulty_plugin")
    };
    let server = Server::with(&place, &[], "");
    assert!(has_library(&server));
    drop(server);
    let server = Server::start(&place);
    let info = server.ask("GET", "/api/object_info/Hazard", "");
    assert!(info["Hazard"].is_object(), "{info}");
    let id = server.submit(&through_hazard(""));
    assert_eq!(server.wait(&id)["status"]["status_str"], "success");
    assert!(server.ask("GET", "/api/system_stats", "")["devices"].is_array());
    assert!(!has_library(&server));
}

#[test]
fn a_question_that_takes_its_process_down_is_lost_alone() {
    let place = Place::with_faulty();
    let server = Server::with(&place, &["--isolate"], "abort-validate");
    let prompt = json!({"prompt": through_hazard("")}).to_string();
    for _ in 0..2 {
        let answer = server.ask("POST", "/api/prompt", &prompt).to_string();
        for part in [
            "PluginCrashed: the plugin faulty-plugin was asked about the parameters of Hazard",
            "(abort); only this question is lost",
        ] {
            assert!(answer.contains(part), "{answer}");
        }
    }
    let id = server.submit(&json!({
        "1": node("Slow", json!({"steps": 2})),
        "2": node("SaveImage", json!({"images": ["1", 0]})),
    }));
    assert_eq!(server.wait(&id)["status"]["status_str"], "success");
}

#[cfg(target_os = "linux")]
#[test]
fn nothing_is_left_of_a_server_that_was_killed_while_a_plugin_never_answers() {
    let place = Place::with_faulty();
    let mut server = Server::with(&place, &["--isolate"], "hang-validate");
    let prompt = json!({"prompt": through_hazard("")}).to_string();
    let mut asking = TcpStream::connect(&server.address).unwrap();
    write!(
        asking,
        "POST /api/prompt HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{prompt}",
        server.address,
        prompt.len()
    )
    .unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let own = server.child.id();
    // Name of the program in brackets, state, parent.
    let facts = |process: u32| {
        let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        let (_, behind) = text.rsplit_once(") ")?;
        let mut words = behind.split(' ');
        let is_dead = words.next()? == "Z";
        (!is_dead).then_some(words.next()?.parse::<u32>().ok()?)
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let all = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let children: Vec<u32> = all.filter(|process| facts(*process) == Some(own)).collect();
    assert!(!children.is_empty(), "nobody was asked");
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let killed = Instant::now();
    while children.iter().any(|process| facts(*process).is_some()) {
        assert!(
            killed.elapsed() < Duration::from_secs(20),
            "it is there still"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn an_isolated_library_that_cannot_be_loaded_is_told_in_one_sentence() {
    let place = Place::with_faulty();
    place.write("w.json", through_hazard("").to_string());
    let run = |more: &[&str], variable: &str, value: &str| {
        let arguments = [&["run", "w.json", "--isolate", "--out", "out"], more].concat();
        done(
            place
                .command(&arguments)
                .env(variable, value)
                .output()
                .unwrap(),
        )
    };
    run(&[], "FAULTY_HABIT", "abort-describe").failed_with(&[
        "cannot load the plugin ",
        "it took its process down (abort)",
    ]);
    place.write("text.so", "not a library");
    run(&["--plugin", "text.so"], "FAULTY_HABIT", "")
        .failed_with(&["cannot load the plugin text.so: the system cannot open it as a library"]);
    run(&[], "FAULTY_DEVICES", "there is no card")
        .failed_with(&["the plugin faulty-plugin cannot compute: there is no card"]);
}
