//! Asks a running server for one thing with `rucomfyui`, and prints what that crate understood as one JSON object.
//!
//! ```text
//! rucomfyui-client describe URL                     the nodes and the machine
//! rucomfyui-client upload   URL PICTURE             the name under which the picture can be loaded
//! rucomfyui-client run      URL WORKFLOW FOLDER     events on the way; pictures saved as FOLDER/NODE-N.png
//! rucomfyui-client refused  URL WORKFLOW            the problems of a workflow that must not be accepted
//! rucomfyui-client stop     URL WORKFLOW NODE       interrupted at the first progress of NODE
//! ```
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use rucomfyui::upload::UploadType;
use rucomfyui::{Client, ClientError, Event, Workflow};
use serde_json::{Value, json};

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let answer = match arguments[..] {
        ["describe", url] => describe(&Client::new(url)).await?,
        ["upload", url, picture] => upload(&Client::new(url), Path::new(picture)).await?,
        ["run", url, file, folder] => {
            run(&Client::new(url), &read(file)?, Path::new(folder)).await?
        }
        ["refused", url, file] => refused(&Client::new(url), &read(file)?).await?,
        ["stop", url, file, node] => stop(&Client::new(url), &read(file)?, node.parse()?).await?,
        _ => bail!("expected describe, upload, run, refused or stop, a URL, and what it works on"),
    };
    println!("{answer}");
    Ok(())
}

fn read(file: &str) -> Result<Workflow> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
    Ok(Workflow::from_json(&text)?)
}

async fn describe(client: &Client) -> Result<Value> {
    let stats = client.system_stats().await?;
    let mut nodes = serde_json::Map::new();
    for (name, object) in client.get_object_info().await? {
        let inputs: Vec<&str> = object.all_inputs().map(|(input, _, _)| input).collect();
        let outputs: Vec<&str> = object
            .processed_output()
            .map(|output| output.name)
            .collect();
        nodes.insert(name, json!({"inputs": inputs, "outputs": outputs}));
    }
    Ok(json!({"nodes": nodes, "devices": stats.devices.len(), "ram_total": stats.system.ram_total}))
}

async fn upload(client: &Client, picture: &Path) -> Result<Value> {
    let name = picture
        .file_name()
        .and_then(|name| name.to_str())
        .context("the picture has no name")?;
    let taken = client
        .upload_image(name, fs::read(picture)?, UploadType::Input, true)
        .await?;
    Ok(json!({"name": taken.name, "subfolder": taken.subfolder, "type": taken.upload_type}))
}

async fn run(client: &Client, workflow: &Workflow, folder: &Path) -> Result<Value> {
    let mut execution = client.execute(workflow).await?;
    let prompt_id = execution.prompt_id().to_owned();
    let (mut started, mut completed, mut progress, mut previews, mut foreign) = (0, 0, 0, 0, 0);
    let mut outputs = serde_json::Map::new();
    while let Some(event) = execution.next().await {
        match event? {
            Event::ExecutionStart { .. } => started += 1,
            Event::Progress {
                prompt_id: id,
                value,
                max,
                ..
            } => {
                progress += 1;
                foreign += u32::from(id != prompt_id || value > max);
            }
            Event::Preview { .. } => previews += 1,
            Event::Executed { node, output, .. } => {
                for (i, image) in output.images.iter().enumerate() {
                    fs::write(folder.join(format!("{node}-{i}.png")), image)?;
                }
                let found = json!({"images": output.images.len(), "texts": output.texts});
                outputs.insert(node.to_string(), found);
            }
            Event::Error { node, message, .. } => bail!("node {node:?}: {message}"),
            Event::Completed { .. } => completed += 1,
            Event::Status { .. } | Event::Executing { .. } => {}
        }
    }
    let history = client.get_history(1).await?;
    let status = &history
        .data
        .get(&prompt_id)
        .context("the last job is not in the history")?
        .status;
    Ok(json!({
        "started": started, "completed": completed, "progress": progress, "previews": previews, "foreign": foreign,
        "outputs": outputs, "status": status.status_str,
    }))
}

async fn refused(client: &Client, workflow: &Workflow) -> Result<Value> {
    match client.queue_prompt(workflow).await {
        Err(ClientError::Validation { error, node_errors }) => {
            let mut nodes = serde_json::Map::new();
            for (id, node) in node_errors.unwrap_or_default() {
                let errors: Vec<String> = node.errors.iter().map(ToString::to_string).collect();
                nodes.insert(
                    id.to_string(),
                    json!({"class": node.class_type, "errors": errors}),
                );
            }
            Ok(json!({"error": error.to_string(), "nodes": nodes}))
        }
        Err(other) => Err(other.into()),
        Ok(job) => bail!("the workflow was accepted as {}", job.prompt_id),
    }
}

async fn stop(client: &Client, workflow: &Workflow, at: u32) -> Result<Value> {
    let mut execution = client.execute(workflow).await?;
    let prompt_id = execution.prompt_id().to_owned();
    let mut listed = None;
    while let Some(event) = execution.next().await {
        match event? {
            Event::Progress {
                node: Some(node), ..
            } if node.0 == at && listed.is_none() => {
                let queue = client.get_queue().await?;
                let running = queue
                    .running
                    .iter()
                    .any(|entry| entry.prompt_id == prompt_id);
                listed = Some(running && queue.pending.is_empty());
                client.interrupt().await?;
            }
            Event::Error { node, message, .. } => {
                let node = node.map(|node| node.0);
                return Ok(json!({"listed": listed, "node": node, "message": message}));
            }
            Event::Completed { .. } => bail!("the job ended before it could be stopped"),
            _ => {}
        }
    }
    bail!("the job ended without a word")
}
