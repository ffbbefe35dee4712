//! `done.json`: that an entry is complete, and what it was made from.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::catalog::Catalog;
use crate::validate::Plan;
use crate::workflow_file::Workflow;

const FILE: &str = "done.json";

/// A result.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Output {
    /// Relative to the entry's folder, with `/`.
    file: String,
    blake3: String,
}

/// See the module. Nothing in it hangs on when or where it was made.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    id: String,
    /// Of everything that the results hang on.
    pub(crate) hash: String,
    outputs: Vec<Output>,
}

impl Done {
    /// The one of a folder; `None` if there is none that can be read.
    pub(crate) fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(folder.join(FILE)).ok()?).ok()
    }

    /// Writes the last file of a folder.
    ///
    /// # Errors
    /// A result cannot be read, or the file not written.
    pub(crate) fn write(
        folder: &Path,
        id: &str,
        hash: &str,
        files: Vec<PathBuf>,
    ) -> std::io::Result<()> {
        let mut outputs = Vec::new();
        for file in files {
            let content = std::fs::read(folder.join(&file))?;
            let parts: Vec<_> = file
                .components()
                .map(|part| part.as_os_str().to_string_lossy())
                .collect();
            outputs.push(Output {
                file: parts.join("/"),
                blake3: blake3::hash(&content).to_hex().to_string(),
            });
        }
        outputs.sort();
        let done = Self {
            id: id.to_owned(),
            hash: hash.to_owned(),
            outputs,
        };
        let text = serde_json::to_vec_pretty(&done)?;
        durable_files::write_new(&folder.join(FILE), |file| file.write_all(&text))
    }
}

/// BLAKE3 of the workflow with its changes, the files that it reads, and the builds of its nodes.
pub(crate) fn hash(workflow: &Workflow, plan: &Plan, catalog: &Catalog) -> String {
    let of_node = |id| {
        let node = &workflow.graph.nodes[id];
        let parameters = catalog
            .descriptor(&node.class)
            .map(|class| class.completed_parameters(&node.parameters()))
            .unwrap_or_default();
        // What cannot be made is told when it runs.
        let fingerprint = catalog
            .create(&node.class)
            .and_then(|node| node.fingerprint(&parameters))
            .unwrap_or_default();
        json!([catalog.build_of(&node.class), fingerprint])
    };
    let nodes: Vec<_> = plan.iter().map(of_node).collect();
    let text = json!([workflow.document(), workflow.graph.to_api(), nodes]).to_string();
    blake3::hash(text.as_bytes()).to_hex().to_string()
}
