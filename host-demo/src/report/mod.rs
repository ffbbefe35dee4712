//! What a run leaves besides its results: `report.html` for people, `run.json` for programs, the workflow, previews.
//!
//! | file | what it makes |
//! | --- | --- |
//! | `mod` | the files of the folder |
//! | `page` | the page: which pictures, in which order |
//! | `html` | escaping, figures, pictures as data |
//! | `curves` | metrics as drawn curves |
//! | `captions` | which prompt or concept a picture belongs to |

mod captions;
mod curves;
mod html;
mod page;

use jiff::Timestamp;
use plugin_api::DeviceDescriptor;
use serde_json::{Value, json};

use crate::catalog::{Catalog, Devices};
use crate::clock;
use crate::pictures::RgbPicture;
use crate::png_text;
use crate::recorder::Record;
use crate::run_folder::{FolderError, RunFolder, write_new, write_shown};
use crate::workflow_file::Workflow;

/// Name of the page in the run's folder.
pub(crate) const FILE_NAME: &str = "report.html";

/// The run in numbers.
#[derive(Debug, Clone)]
pub(crate) struct Summary {
    pub(crate) started: Timestamp,
    pub(crate) seconds: f64,
    /// Where it was computed; memory as it was at the start.
    pub(crate) devices: Devices,
}

/// Writes everything into the run's folder.
///
/// # Errors
/// The first file that cannot be written.
pub(crate) fn write(
    folder: &RunFolder,
    workflow: &Workflow,
    catalog: &Catalog,
    record: &Record,
    summary: &Summary,
) -> Result<(), FolderError> {
    let path = |name: &str| folder.path().join(name);
    for strip in &record.strips {
        for (i, frame) in strip.frames.iter().enumerate() {
            let name = format!(
                "previews/{}-{}/{:03}-{}.png",
                file_name(&strip.node.id),
                file_name(&strip.series),
                i + 1,
                file_name(&frame.label)
            );
            // The same name twice, after what is not a letter or digit was replaced: the first one stays.
            if !path(&name).exists() {
                write_shown(&path(&name), &png(&frame.picture))?;
            }
        }
    }
    write_new(
        &path("workflow.json"),
        pretty(&workflow.document()).as_bytes(),
    )?;
    write_new(
        &path("run.json"),
        pretty(&run_json(workflow, catalog, record, summary)).as_bytes(),
    )?;
    // Last: a folder with a report is complete.
    let page = page::render(workflow, catalog, record, summary);
    write_new(&path(FILE_NAME), folder.after_commit(&page).as_bytes())
}

/// A picture without text; an empty file for one that cannot be, which the page shows as missing.
fn png(picture: &RgbPicture) -> Vec<u8> {
    png_text::encode(picture, &[]).unwrap_or_default()
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}

/// Text as part of a file name.
fn file_name(text: &str) -> String {
    let kept: String = text
        .chars()
        .map(|c| if c.is_alphanumeric() { c } else { '-' })
        .take(48)
        .collect();
    kept.split('-')
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("-")
}

fn device_json(device: &DeviceDescriptor) -> Value {
    let memory = device.memory.map(|memory| memory.total);
    json!({"kind": device.kind.name(), "index": device.index, "product": device.product, "memory": memory})
}

fn run_json(workflow: &Workflow, catalog: &Catalog, record: &Record, summary: &Summary) -> Value {
    let plugins: Vec<_> = catalog
        .plugins()
        .iter()
        .map(|plugin| {
            let devices: Vec<_> = summary.devices.of(&plugin.name).iter().map(device_json).collect();
            json!({"name": plugin.name, "version": plugin.version, "build": plugin.build, "devices": devices})
        })
        .collect();
    let nodes: Vec<_> = record
        .nodes
        .iter()
        .map(|node| {
            let label = &node.label;
            json!({"id": label.id, "class": label.class, "title": label.title, "seconds": node.seconds,
                "cached": node.seconds.is_none()})
        })
        .collect();
    let metrics: Vec<_> = record
        .curves
        .iter()
        .map(|curve| json!({"node": curve.node.id, "series": curve.series, "points": curve.points}))
        .collect();
    let files: Vec<_> = record
        .files
        .iter()
        .map(|(node, path)| json!({"node": node.id, "file": path.to_string_lossy().replace('\\', "/")}))
        .collect();
    json!({
        "status": "success",
        "workflow": workflow.name,
        "host": env!("CARGO_PKG_VERSION"),
        "started": clock::iso(summary.started),
        "seconds": summary.seconds,
        "plugins": plugins,
        "prompt": workflow.graph.to_api(),
        "nodes": nodes,
        "files": files,
        "metrics": metrics,
        "events": record.events,
    })
}
