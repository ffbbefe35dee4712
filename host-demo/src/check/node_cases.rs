//! Cases of every node. Whatever a node is given, a crash ends the process of the case, which tells it to the parent.

use std::sync::Barrier;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use plugin_api::{
    ErrorCode, NodeDescriptor, NodeError, Opaque, Outputs, SharedObject, SharedTensor, Value,
};
use serde_json::Map;

use super::given::{self, Feeder, Inputs, Place, quick_parameters};
use super::listener::{Behavior, HOST_PANIC};
use super::memory::{Held, heap_bytes};
use super::subject::{NotPassed, NotRunnable, Outcome, Ran, Subject, failed};
use crate::executor::{WORKER_STACK, check_outputs};

/// When a node is asked to stop within its run.
const CANCEL_AFTER: Duration = Duration::from_millis(200);
/// What disturbs a measurement makes it larger, never smaller.
const N_TRIES: usize = 3;
/// Runs on what does not fit are stopped after this: here it only counts that they end.
const SHORT: Duration = Duration::from_millis(200);

/// Calls of the host's services that no run is too short for, and calls per second that none needs.
const MANY_CALLS: usize = 10_000;
const MANY_CALLS_PER_SECOND: f64 = 1000.0;

/// Runs of each of two threads at once, and the time after which no more are begun.
const N_RUNS_AT_ONCE: usize = 20;
const LONGEST_AT_ONCE: Duration = Duration::from_secs(2);

/// Lives of a node that are counted, after as many that are not: what is made once stays.
const N_LIVES: usize = 100;
/// Batches of them, of which the one counts that leaves least.
const N_BATCHES: usize = 10;
/// Fewer bytes than this stay by themselves; the smallest block of a heap is as large.
const SMALLEST_BLOCK: usize = 32;

pub(crate) fn lifecycle(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    let parameters = node.completed_parameters(&Map::new());
    let text = serde_json::Value::Object(parameters).to_string();
    let live = || -> Outcome {
        let made = subject.create(&node.class)?;
        let validated = made.validate(&text);
        subject.no_panic("it validates its defaults", &validated)?;
        let print = made.fingerprint(&text);
        subject.no_panic("it is asked for its fingerprint", &print)
    };
    subject.trail.at("was made and dropped");
    let many = || (0..N_LIVES).try_for_each(|_| live());
    many()?;
    // An allocator's own books change too, but not every time.
    let mut stays = usize::MAX;
    for _ in 0..N_BATCHES {
        let before = heap_bytes();
        many()?;
        let grown = heap_bytes().zip(before);
        stays = stays.min(grown.map_or(0, |(after, before)| after.saturating_sub(before)));
    }
    if stays >= N_LIVES * SMALLEST_BLOCK {
        return failed(format!(
            "it leaks: {stays} bytes stay after {N_LIVES} nodes were made and dropped"
        ));
    }
    Ok(())
}

pub(crate) fn missing_inputs(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    let required: Vec<_> = node.inputs.iter().filter(|input| !input.optional).collect();
    if required.is_empty() {
        return Err(NotPassed::Skipped("it has no required input".to_owned()));
    }
    // With all others there, where they can be made.
    let mut feeder = Feeder::default();
    let held = Held::default();
    let all = feeder.inputs(subject, node, false, Place::Heap, &held);
    for socket in required {
        let mut inputs = all.clone().unwrap_or_default();
        inputs.remove(&socket.name);
        let when = format!("without its input {}", socket.name);
        subject.trail.at(&format!("ran {when}"));
        let ran = short_run(subject, node, inputs)?;
        subject.no_panic(&when, &ran.result)?;
        if ran.result.is_ok() {
            return failed(format!(
                "{when} it returns outputs, it should return an error"
            ));
        }
    }
    Ok(())
}

fn short_run(
    subject: &Subject<'_>,
    node: &NodeDescriptor,
    inputs: Inputs,
) -> Result<Ran, NotPassed> {
    let mut made = subject.create(&node.class)?;
    let behavior = Behavior::CancelsAfter(SHORT);
    Ok(subject.run(&mut made, inputs, &quick_parameters(node), behavior))
}

/// A value that no plugin knows.
struct Stranger;

impl Opaque for Stranger {
    fn summary(&self) -> String {
        "an object of the host's".to_owned()
    }

    fn memory(&self) -> Vec<plugin_api::MemoryBlock> {
        Vec::new()
    }
}

/// Values that are of no use on a socket of this type, with what they are.
fn strange(port: &str) -> Result<Vec<(&'static str, Value)>, NotPassed> {
    let tensor = |values: Vec<f32>, shape: &[usize]| {
        SharedTensor::from_vec(values, shape)
            .map(Value::Tensor)
            .map_err(|error| NotPassed::Failed(error.to_string()))
    };
    let mut values = vec![
        (
            "a tensor without elements",
            tensor(Vec::new(), &[0, 4, 4, 3])?,
        ),
        ("a tensor without dimensions", tensor(vec![0.5], &[])?),
        (
            "a tensor of eight dimensions",
            tensor(vec![0.5; 256], &[2; 8])?,
        ),
    ];
    if let Some(shape) = given::shape(port) {
        let n = shape.iter().product();
        values.push(("a tensor of NaN", tensor(vec![f32::NAN; n], &shape)?));
        values.push(("infinite numbers", tensor(vec![f32::INFINITY; n], &shape)?));
        values.push(("huge numbers", tensor(vec![f32::MAX; n], &shape)?));
        values.push(("negative numbers", tensor(vec![-1.0; n], &shape)?));
        let bytes = SharedTensor::from_vec(vec![200u8; n], &shape);
        let bytes = bytes.map_err(|error| NotPassed::Failed(error.to_string()))?;
        values.push(("a tensor of bytes", Value::Tensor(bytes)));
        let mut long = shape.clone();
        long[1] = 1;
        long[2] = 1 << 16;
        let n = long.iter().product();
        values.push(("a very long tensor", tensor(vec![0.5; n], &long)?));
    }
    Ok(values)
}

pub(crate) fn wrong_inputs(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    let mut feeder = Feeder::default();
    let (place, held) = (Place::Heap, Held::default());
    let good = feeder.inputs(subject, node, false, place, &held);
    let good = good.unwrap_or_default();
    for socket in &node.inputs {
        let is_tensor = given::shape(&socket.port).is_some();
        let object = Value::Object(SharedObject::new(&socket.port, Stranger));
        let mut never = vec![("an object that another library made", object)];
        if is_tensor {
            never.push(("a text", Value::Json("\"text\"".into())));
        }
        for (what, value, must_fail) in never
            .into_iter()
            .map(|(what, value)| (what, value, !socket.optional))
            .chain(
                strange(&socket.port)?
                    .into_iter()
                    .map(|(what, value)| (what, value, false)),
            )
        {
            let mut inputs = good.clone();
            inputs.insert(socket.name.clone(), value);
            let when = format!("with {what} on its input {}", socket.name);
            subject.trail.at(&format!("ran {when}"));
            let ran = short_run(subject, node, inputs)?;
            subject.no_panic(&when, &ran.result)?;
            if must_fail && ran.result.is_ok() {
                return failed(format!(
                    "{when} it returns outputs, it should return an error"
                ));
            }
        }
    }
    let mut inputs = good;
    let unknown = Value::Json("1".into());
    inputs.insert("no-such-input".to_owned(), unknown);
    subject.trail.at("ran with an input that it does not have");
    let ran = short_run(subject, node, inputs)?;
    subject.no_panic("with an input that it does not have", &ran.result)
}

pub(crate) fn wrong_parameters(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    let mut texts: Vec<String> = ["", "{", "[]", "null", "7", "{\"a\":}", "\u{0}"]
        .map(str::to_owned)
        .into();
    texts.push("[".repeat(10_000));
    texts.push("{\"no-such-parameter\": 1}".to_owned());
    let long = format!("\"{}\"", "x".repeat(1 << 20));
    let words = [
        "null",
        "[]",
        "{}",
        "true",
        "-1",
        "1e999",
        "-1e308",
        "0.5",
        "\"NaN\"",
        "\"\"",
        "18446744073709551615",
        "-9223372036854775808",
        "\"\\u0000\"",
        &long,
    ];
    for widget in &node.widgets {
        let name = serde_json::Value::from(widget.name.as_str());
        texts.extend(words.iter().map(|word| format!("{{{name}: {word}}}")));
    }
    let mut feeder = Feeder::default();
    let (place, held) = (Place::Heap, Held::default());
    let inputs = feeder.inputs(subject, node, false, place, &held);
    let inputs = inputs.unwrap_or_default();
    for text in texts {
        let named: String = text.chars().take(60).collect();
        let when = format!("with the parameters {named}");
        let mut made = subject.create_for(&node.class, &text, &when)?;
        // Those that fit are run where random ones are.
        let fits =
            serde_json::from_str(&text).is_ok_and(|given| node.check_parameters(&given).is_empty());
        if !fits {
            let stop = Behavior::CancelsAfter(Duration::ZERO);
            let ran = subject.run_text(&mut made, inputs.clone(), &text, stop);
            subject.no_panic(&when, &ran.result)?;
        }
    }
    Ok(())
}

pub(crate) fn outputs(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    match subject.runnable(node) {
        Ok(runnable) => {
            let outputs = runnable.ran.result.unwrap_or_default();
            check_values(node, &outputs).or_else(failed)
        }
        // A node that panics over what it should take is no matter of taste.
        Err(NotRunnable::Refused(error)) if error.error_code() == ErrorCode::Panicked => {
            failed(format!("on generated inputs: {error}"))
        }
        Err(other) => Err(other.into()),
    }
}

/// Number, types and finite values of outputs.
pub(crate) fn check_values(node: &NodeDescriptor, outputs: &[Value]) -> Result<(), String> {
    check_outputs(node, outputs).map_err(|error| error.message.into_string())?;
    for (socket, value) in node.outputs.iter().zip(outputs) {
        let name = &socket.name;
        match value {
            Value::Tensor(tensor) => {
                let Ok(values) = tensor.to_f32() else {
                    continue;
                };
                let is_drawn = given::shape(&socket.port).is_some();
                if is_drawn && let Some(at) = values.iter().position(|value| !value.is_finite()) {
                    let value = values[at];
                    return Err(format!("its output {name} has the value {value} at {at}"));
                }
            }
            Value::Json(text) => {
                let read: Result<serde_json::Value, _> = serde_json::from_str(text);
                if read.is_err() {
                    return Err(format!("its output {name} is no JSON: {text}"));
                }
            }
            Value::Object(_) => {}
        }
    }
    Ok(())
}

pub(crate) fn inputs_unchanged(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    let mut runnable = subject.runnable(node)?;
    for place in [Place::Heap, Place::WriteProtected] {
        let given = runnable.inputs(subject, node, place, &Held::default())?;
        let before = bytes(given.values())?;
        if before.is_empty() {
            return Err(NotPassed::Skipped(
                "no tensor can be given to it".to_owned(),
            ));
        }
        subject.trail.at(match place {
            Place::Heap => "ran on inputs that others hold too",
            Place::WriteProtected => "ran on inputs in memory that cannot be written",
        });
        let mut made = subject.create(&node.class)?;
        let behavior = Behavior::Patient;
        let ran = subject.run(&mut made, given.clone(), &runnable.parameters, behavior);
        if let Err(error) = ran.result {
            return failed(format!(
                "on memory that it must not write it fails: {error}"
            ));
        }
        if bytes(given.values())? != before {
            return failed(
                "it changed a tensor that others hold too; make_unique gives one to write",
            );
        }
    }
    Ok(())
}

/// The values of tensors, texts, and what objects say of themselves.
fn bytes<'a>(values: impl Iterator<Item = &'a Value>) -> Result<Vec<Vec<u8>>, NotPassed> {
    let value = |value: &Value| match value {
        Value::Tensor(tensor) => {
            let values = tensor.to_f32();
            let values = values.map_err(|error| NotPassed::Skipped(error.to_string()))?;
            let bytes = values
                .iter()
                .flat_map(|value| value.to_bits().to_le_bytes());
            Ok(bytes.collect())
        }
        Value::Json(text) => Ok(text.as_bytes().to_vec()),
        Value::Object(object) => Ok(object.summary().into_bytes()),
    };
    values.map(value).collect()
}

pub(crate) fn repeatable(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    let mut runnable = subject.runnable(node)?;
    let first = bytes(runnable.ran.result.iter().flatten())?;
    let held = Held::default();
    let inputs = runnable.inputs(subject, node, Place::Heap, &held)?;
    let mut made = subject.create(&node.class)?;
    subject.trail.at("ran a second time");
    let behavior = Behavior::Patient;
    let ran = subject.run(&mut made, inputs, &runnable.parameters, behavior);
    let second = match &ran.result {
        Ok(outputs) => bytes(outputs.iter())?,
        Err(error) => return failed(format!("the second run ends in an error: {error}")),
    };
    let differs = first
        .iter()
        .zip(&second)
        .position(|(one, other)| one != other);
    match differs {
        Some(i) => {
            let name = node.outputs.get(i).map_or("", |output| &output.name);
            failed(format!(
                "the same inputs give another {name} the second time"
            ))
        }
        None => Ok(()),
    }
}

pub(crate) fn two_threads(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    let mut runnable = subject.runnable(node)?;
    let alone = bytes(runnable.ran.result.iter().flatten())?;
    let inputs = runnable.inputs(subject, node, Place::Heap, &Held::default())?;
    let parameters = &runnable.parameters;
    let text = serde_json::Value::Object(parameters.clone()).to_string();
    let (begin, started) = (Barrier::new(2), Instant::now());
    let run_beside_another = |subject: &Subject<'_>| -> Outcome {
        begin.wait();
        for _ in 0..N_RUNS_AT_ONCE {
            let when = "on two threads at once";
            let mut made = subject.create_for(&node.class, &text, when)?;
            let described = subject.exports.describe();
            if !described.is_ok_and(|again| again.nodes == subject.plugin.nodes) {
                return failed("described on two threads at once the plugin says something else");
            }
            let ran = subject.run(&mut made, inputs.clone(), parameters, Behavior::Patient);
            match &ran.result {
                Err(error) => {
                    return failed(format!("beside another it ends in an error: {error}"));
                }
                Ok(outputs) if bytes(outputs.iter())? != alone => {
                    return failed("beside another it gives something else than alone");
                }
                Ok(_) if started.elapsed() > LONGEST_AT_ONCE => break,
                Ok(_) => {}
            }
        }
        Ok(())
    };
    let folders = ["first", "second"].map(|name| subject.in_folder(name));
    thread::scope(|scope| {
        let threads = folders.each_ref().map(|subject| {
            let thread = thread::Builder::new().stack_size(WORKER_STACK);
            thread.spawn_scoped(scope, || run_beside_another(subject))
        });
        threads
            .into_iter()
            .try_for_each(|thread| match thread.map(ScopedJoinHandle::join) {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_)) => failed("the check itself panicked; please report it"),
                Err(error) => Err(NotPassed::Skipped(format!(
                    "there are no two threads: {error}"
                ))),
            })
    })
}

pub(crate) fn cancel(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    let mut runnable = subject.runnable(node)?;
    // As long as it takes by itself, where it runs so.
    let defaults = node.completed_parameters(&Map::new());
    for (when, after) in [
        ("before its run", Duration::ZERO),
        ("within its run", CANCEL_AFTER),
    ] {
        let mut slowest = None;
        for _ in 0..N_TRIES {
            let inputs = runnable.inputs(subject, node, Place::Heap, &Held::default())?;
            let mut made = subject.create(&node.class)?;
            subject.trail.at(&format!("was asked to stop {when}"));
            let behavior = Behavior::CancelsAfter(after);
            let mut ran = subject.run(&mut made, inputs.clone(), &defaults, behavior);
            if is_refusal(&ran.result) {
                ran = subject.run(&mut made, inputs, &runnable.parameters, behavior);
            }
            match &ran.result {
                Err(error) if error.error_code() != ErrorCode::Canceled => {
                    return failed(format!(
                        "asked to stop {when} it returns another error: {error}"
                    ));
                }
                _ => {}
            }
            slowest = ran.took_to_stop.filter(|took| *took > subject.cancel_limit);
            if slowest.is_none() {
                break;
            }
        }
        if let Some(took) = slowest {
            return failed(format!(
                "asked to stop {when} it went on for {} ms, at most {} are good",
                took.as_millis(),
                subject.cancel_limit.as_millis()
            ));
        }
    }
    Ok(())
}

/// An error that is about what was given.
fn is_refusal(result: &Result<Outputs, NodeError>) -> bool {
    matches!(result, Err(error) if error.error_code() != ErrorCode::Canceled)
}

pub(crate) fn progress(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    let runnable = subject.runnable(node)?;
    let Ran {
        heard,
        took,
        record,
        ..
    } = runnable.ran;
    if let Some(wrong) = heard.wrong {
        return failed(wrong);
    }
    let per_second = heard.n_calls as f64 / took.as_secs_f64().max(1e-6);
    if heard.n_calls > MANY_CALLS && per_second > MANY_CALLS_PER_SECOND {
        return failed(format!(
            "it called its host {} times in {:.2} s; once per step is good",
            heard.n_calls,
            took.as_secs_f64()
        ));
    }
    std::thread::sleep(Duration::from_millis(20));
    match record.late().n_calls {
        0 => Ok(()),
        n => failed(format!(
            "it called its host {n} times after its run was over"
        )),
    }
}

pub(crate) fn references(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    let mut runnable = subject.runnable(node)?;
    let held = Held::default();
    let inputs = runnable.inputs(subject, node, Place::Heap, &held)?;
    let n_given = held.count();
    let mut made = subject.create(&node.class)?;
    subject.trail.at("ran on inputs that are counted");
    let behavior = Behavior::Patient;
    let ran = subject.run(&mut made, inputs, &runnable.parameters, behavior);
    let is_over = ran.result.is_ok();
    drop((ran.result, made));
    subject.trail.at("was dropped with its outputs");
    if ran.record.is_held() {
        return failed("its host is still held when the run, its outputs and the node are gone");
    }
    match held.count() {
        0 if is_over => Ok(()),
        0 => failed("its second run ends in an error"),
        n => failed(format!(
            "{n} of {n_given} inputs are still held when the run, its outputs and the node are gone"
        )),
    }
}

pub(crate) fn host_fault(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    let mut runnable = subject.runnable(node)?;
    let inputs = runnable.inputs(subject, node, Place::Heap, &Held::default())?;
    let mut made = subject.create(&node.class)?;
    subject.trail.at("ran with a host whose services panic");
    let behavior = Behavior::Panics;
    let ran = subject.run(&mut made, inputs, &runnable.parameters, behavior);
    match ran.result {
        // It called none.
        Ok(_) => Ok(()),
        Err(error) if error.message.contains(HOST_PANIC) => Ok(()),
        Err(error) => failed(format!("it makes another error of the host's: {error}")),
    }
}
