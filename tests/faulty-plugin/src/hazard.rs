//! One node with one bad habit, chosen by name: by the variable `FAULTY_HABIT` for whatever comes before parameters, by its
//! parameter for the rest. Without a habit it is honest: pictures in, pictures out.
//!
//! | habit | what it does |
//! | --- | --- |
//! | `slow-describe`, `panic-describe`, `abort-describe` | when it is described |
//! | `bad-descriptor` | describes a parameter with a default out of bounds, and one socket twice |
//! | `another-descriptor` | describes itself in other words each time |
//! | `panic-create`, `panic-drop`, `panic-validate`, `panic-fingerprint`, `panic-run` | panics there |
//! | `loose-extension` | has extensions of all names |
//! | `leak` | a node leaves memory behind |
//! | `abort-validate`, `hang-validate` | ends the process when it looks at parameters, or looks for ever |
//! | `abort`, `segfault`, `hang`, `exit`, `memory` | what ends or stops a process; the last asks for memory until there is none |
//! | `too-few`, `wrong-type`, `wrong-shape`, `not-finite` | what it returns |
//! | `scribble` | writes to its input |
//! | `random` | gives something else every time |
//! | `one-for-all` | keeps its work where all nodes of the class keep theirs |
//! | `keep-input` | never gives its input back |
//! | `ignore-missing`, `ignore-type` | takes what it must refuse |
//! | `flood`, `beyond` | progress without measure, or beyond its end |
//! | `ignore-cancel` | goes on when it is asked to stop |
//! | `deep` | panics where `level` is above 900 |
#![expect(unsafe_code, reason = "segfault, scribble: what these habits are")]
#![expect(clippy::panic, clippy::mem_forget, reason = "what these habits are")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use plugin_api::{
    Extension, Host, InputSocket, Inputs, Node, NodeDescriptor, NodeError, Outputs, SharedTensor,
    Value, Widget, WidgetKind,
};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::honest::shared;

/// Of the whole process.
fn process_habit() -> String {
    std::env::var("FAULTY_HABIT").unwrap_or_default()
}

fn panic_if(habit: &str) {
    if process_habit() == habit {
        panic!("the habit {habit}");
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Hazard;

impl Default for Hazard {
    fn default() -> Self {
        panic_if("panic-create");
        if process_habit() == "leak" {
            std::mem::forget(std::hint::black_box(vec![1u8; 100]));
        }
        Self
    }
}

impl Drop for Hazard {
    fn drop(&mut self) {
        panic_if("panic-drop");
    }
}

#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Parameters {
    /// The habit
    #[serde(default = "process_habit")]
    habit: String,
    /// A number
    #[serde(default)]
    #[schemars(range(min = 0, max = 1000))]
    level: u32,
}

impl Node for Hazard {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        static CALLS: AtomicU64 = AtomicU64::new(0);
        let habit = process_habit();
        let mut words = "Has one bad habit".to_owned();
        match habit.as_str() {
            "slow-describe" => std::thread::sleep(Duration::from_secs(6)),
            "panic-describe" => panic!("the habit panic-describe"),
            "abort-describe" => std::process::abort(),
            "another-descriptor" => {
                words = format!("Described {} times", CALLS.fetch_add(1, Ordering::SeqCst));
            }
            _ => {}
        }
        let mut descriptor =
            NodeDescriptor::new::<Parameters>("Hazard", "Hazard", "faulty", &words)
                .input("images", picture_ports::IMAGE, "Pictures")
                .output("images", picture_ports::IMAGE, "The same pictures");
        if habit == "bad-descriptor" {
            descriptor.inputs.push(InputSocket {
                name: "images".to_owned(),
                port: picture_ports::MASK.to_owned(),
                optional: true,
                tooltip: String::new(),
            });
            descriptor.widgets.push(Widget {
                name: "size".to_owned(),
                tooltip: "A size".to_owned(),
                kind: WidgetKind::Integer {
                    default: 11,
                    min: 0,
                    max: 10,
                    seed: false,
                },
            });
        }
        descriptor
    }

    fn validate(&self, _: &Parameters) -> Result<(), NodeError> {
        panic_if("panic-validate");
        if process_habit() == "abort-validate" {
            std::process::abort();
        }
        while process_habit() == "hang-validate" {
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(())
    }

    fn fingerprint(&self, _: &Parameters) -> String {
        panic_if("panic-fingerprint");
        String::new()
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        Parameters { habit, level }: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let honest = || picture(0.5);
        match habit.as_str() {
            "ignore-missing" => return Ok(vec![honest()?]),
            "ignore-type" => {
                return match inputs.tensor("images") {
                    Err(error) if error.message.contains("nothing is linked") => Err(error),
                    _ => Ok(vec![honest()?]),
                };
            }
            _ => {}
        }
        let images = inputs.tensor("images")?.clone();
        let outputs = match habit.as_str() {
            "panic-run" => panic!("the habit panic-run"),
            "abort" => std::process::abort(),
            "exit" => std::process::exit(0),
            "segfault" => {
                // SAFETY: none; it is the crash that is wanted.
                unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(1) };
                Vec::new()
            }
            "hang" => loop {
                std::thread::sleep(Duration::from_secs(1));
            },
            "memory" => exhaust(),
            "too-few" => Vec::new(),
            "wrong-type" => vec![Value::Json("7".into())],
            "wrong-shape" => vec![Value::Tensor(shared(vec![0.5; 16], &[4, 4])?)],
            "not-finite" => vec![picture(f32::NAN)?],
            "random" => {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                let nanoseconds = now.unwrap_or_default().subsec_nanos();
                vec![picture(nanoseconds as f32)?]
            }
            "scribble" => {
                // SAFETY: none; it is what the contract forbids.
                unsafe { (images.data_address() as *mut f32).write_volatile(7.0) };
                vec![Value::Tensor(images)]
            }
            "one-for-all" => {
                static WORK: AtomicU64 = AtomicU64::new(0);
                let own = std::ptr::from_ref(&*self).addr() as u64;
                WORK.store(own, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(20));
                let is_own = WORK.load(Ordering::SeqCst) == own;
                vec![picture(if is_own { 0.5 } else { 0.25 })?]
            }
            "keep-input" => {
                std::mem::forget(images);
                vec![honest()?]
            }
            "flood" => {
                for i in 0..200_000 {
                    host.progress("flood", i, 200_000, "");
                }
                vec![honest()?]
            }
            "beyond" => {
                host.progress("beyond", 7, 3, "");
                vec![honest()?]
            }
            "ignore-cancel" => {
                let started = Instant::now();
                while started.elapsed() < Duration::from_millis(1500) {
                    std::thread::sleep(Duration::from_millis(10));
                }
                vec![honest()?]
            }
            "deep" if level > 900 => panic!("the level {level} is deep"),
            _ => vec![Value::Tensor(images)],
        };
        Ok(outputs)
    }

    fn extension(&self, _: &str) -> Option<Box<dyn Extension>> {
        (process_habit() == "loose-extension").then(crate::panicking::echo)
    }
}

fn picture(value: f32) -> Result<Value, NodeError> {
    let picture: SharedTensor = shared(vec![value; 48], &[1, 4, 4, 3])?;
    Ok(Value::Tensor(picture))
}

/// Until the allocator has no more, which ends the process.
fn exhaust() -> Outputs {
    let mut all = Vec::new();
    loop {
        all.push(vec![1u8; 1 << 28]);
        std::hint::black_box(&all);
    }
}
