use std::collections::BTreeMap;

use parking_lot::Mutex;
use serde_json::json;

use super::*;
use crate::run_folder::{Destination, RunFolder, WorkDirs};
use crate::validate::validate;

/// Remembers what happened, as `id event`, and the signatures of nodes that are done.
#[derive(Default)]
struct Log {
    events: Mutex<Vec<String>>,
    signatures: Mutex<Vec<String>>,
}

impl Observer for Log {
    fn on_event(&self, node: &NodeLabel, event: &Event<'_>) {
        let event = match event {
            Event::Started { .. } => "started",
            Event::Cached { .. } => "cached",
            Event::Finished { signature, .. } => {
                self.signatures.lock().push(signature.as_str().to_owned());
                "finished"
            }
            Event::Saved { .. } => "saved",
            Event::Preview { .. } => "preview",
            Event::Log { level: 2, text } => text,
            Event::Progress(_) | Event::Metric { .. } | Event::Log { .. } => return,
        };
        self.events.lock().push(format!("{} {event}", node.id));
    }
}

fn run_once(
    document: &Json,
    cache: &mut Cache,
    cancel: bool,
) -> (Result<(), RunError>, Vec<String>) {
    let root = tempfile::tempdir().unwrap();
    let folder = RunFolder::create(&Destination::Exactly(root.path().join("out"))).unwrap();
    let log = Arc::new(Log::default());
    let result = run_in(
        document,
        cache,
        cancel,
        folder.path(),
        &folder.work_dirs(),
        &log,
    );
    (result, log.events.lock().clone())
}

fn run_in(
    document: &Json,
    cache: &mut Cache,
    cancel: bool,
    output_dir: &Path,
    work_dirs: &WorkDirs,
    log: &Arc<Log>,
) -> Result<(), RunError> {
    let graph = Graph::from_api(document.as_object().unwrap()).unwrap();
    let catalog = Catalog::builtin_only();
    let plan = validate(&graph, &catalog).unwrap();
    let job = Job {
        graph: &graph,
        plan: &plan,
        catalog: &catalog,
        output_dir,
        work_dirs,
        workflow: String::new(),
        prompt: String::new(),
        cancel: Arc::new(AtomicBool::new(cancel)),
        observer: log.clone(),
    };
    run(&job, cache)
}

fn demo(prefix: &str) -> Json {
    json!({
        "1": {"class_type": "LoadImage", "inputs": {"image": "demo:man-and-cat.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    })
}

#[test]
fn unchanged_nodes_come_from_the_cache_and_output_nodes_run_again() {
    let mut cache = Cache::new(1 << 30);
    let (result, log) = run_once(&demo("a"), &mut cache, false);
    assert!(result.is_ok());
    assert_eq!(
        log,
        [
            "1 started",
            "1 finished",
            "2 started",
            "2 saved",
            "2 finished"
        ]
    );
    let (_, log) = run_once(&demo("a"), &mut cache, false);
    assert_eq!(log, ["1 cached", "2 started", "2 saved", "2 finished"]);
    let other = json!({
        "1": {"class_type": "LoadImage", "inputs": {"image": "demo:man-and-cat-mask-man.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    });
    let (_, log) = run_once(&other, &mut cache, false);
    assert_eq!(
        log,
        [
            "1 started",
            "1 finished",
            "2 started",
            "2 preview",
            "2 finished"
        ]
    );
}

#[test]
fn a_canceled_run_starts_nothing() {
    let (result, log) = run_once(&demo("a"), &mut Cache::new(0), true);
    assert!(matches!(
        result,
        Err(RunError::Canceled {
            resumable: false,
            ..
        })
    ));
    assert_eq!(log, [] as [&str; 0]);
}

#[test]
fn who_cannot_keep_states_runs_and_says_so() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("no folder"), "").unwrap();
    let dirs = WorkDirs::new(root.path().join("no folder"));
    let log = Arc::new(Log::default());
    run_in(
        &demo("a"),
        &mut Cache::new(0),
        false,
        root.path(),
        &dirs,
        &log,
    )
    .unwrap();
    let told = log.events.lock().join("\n");
    assert!(told.contains("1 finished") && told.contains("2 finished"));
    assert!(told.contains("if this one is stopped it cannot go on where it was"));
    assert!(root.path().join("a_00001.png").is_file());
}

#[test]
fn a_node_that_keeps_nothing_has_no_folder_once_it_is_done() {
    let root = tempfile::tempdir().unwrap();
    let dirs = WorkDirs::new(root.path().join("work"));
    let log = Arc::new(Log::default());
    run_in(
        &demo("a"),
        &mut Cache::new(0),
        false,
        root.path(),
        &dirs,
        &log,
    )
    .unwrap();
    assert!(!dirs.root().exists(), "before the run is kept");

    let left = dirs.path_of(&log.signatures.lock()[0]);
    std::fs::create_dir_all(&left).unwrap();
    std::fs::write(left.join("state"), "of a run that was cut short").unwrap();
    run_in(
        &demo("a"),
        &mut Cache::new(0),
        false,
        root.path(),
        &dirs,
        &log,
    )
    .unwrap();
    assert!(left.exists(), "its results are not kept yet");
    dirs.finish();
    assert!(!dirs.root().exists());
}

#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_nodes_cannot_be_told_is_refused_before_anything_runs() {
    use std::os::unix::ffi::OsStrExt as _;
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9"));
    std::fs::create_dir(&folder).unwrap();
    let dirs = WorkDirs::new(root.path().join("work"));
    let log = Arc::new(Log::default());
    let ended = run_in(&demo("a"), &mut Cache::new(0), false, &folder, &dirs, &log);
    let error = ended.unwrap_err().to_string();
    assert!(
        error.contains("node 1") && error.contains("not UTF-8"),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
}

#[test]
fn errors_name_node_and_input() {
    let document = json!({
        "1": {"class_type": "LoadImageMask", "inputs": {"image": "demo:man-and-cat-mask-man.png"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "demo:man-and-cat.png"}},
        "3": {"class_type": "MaskToImage", "inputs": {"mask": ["1", 0]}},
        "4": {"class_type": "ImageBatch", "inputs": {"image1": ["2", 0], "image2": ["3", 0]}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    });
    let (result, _) = run_once(&document, &mut Cache::new(0), false);
    assert!(result.is_ok(), "both are of one size");
    let error = RunError::Node {
        node: NodeLabel {
            id: "4".to_owned(),
            class: "ImageBatch".to_owned(),
            title: String::new(),
        },
        error: Box::new(NodeError::invalid_input("image2", "it is too small")),
    };
    assert_eq!(
        error.to_string(),
        "node 4 (ImageBatch), input image2: it is too small"
    );
}

#[test]
fn values_are_freed_when_nobody_waits_for_them() {
    let graph = Graph::from_api(demo("a").as_object().unwrap()).unwrap();
    let catalog = Catalog::builtin_only();
    let plan = validate(&graph, &catalog).unwrap();
    let root = tempfile::tempdir().unwrap();
    let folder = RunFolder::create(&Destination::Exactly(root.path().join("out"))).unwrap();
    let job = Job {
        graph: &graph,
        plan: &plan,
        catalog: &catalog,
        output_dir: folder.path(),
        work_dirs: &folder.work_dirs(),
        workflow: String::new(),
        prompt: String::new(),
        cancel: Arc::new(AtomicBool::new(false)),
        observer: Arc::new(Log::default()),
    };
    let mut worker = Worker::new(&job);
    assert_eq!(worker.waiting, BTreeMap::from([(NodeId::new("1"), 1)]));
    worker
        .values
        .insert(NodeId::new("1"), vec![Value::Json("0".into())]);
    worker.values.insert(NodeId::new("2"), Vec::new());
    worker.release(&NodeId::new("2"), &graph.nodes[&NodeId::new("2")]);
    assert!(worker.values.is_empty());
}
