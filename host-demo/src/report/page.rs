//! The page: what a person wants to see of a run, results first.

use std::fmt::Write as _;

use super::captions::{self, List};
use super::html::{escape, figure, grid, section, table};
use super::{Summary, curves};
use crate::catalog::Catalog;
use crate::clock;
use crate::graph::{GraphNode, Input, NodeId};
use crate::recorder::{NodeRecord, Record, ShownOutput};
use crate::workflow_file::Workflow;

/// A complete page that needs nothing from outside.
pub(super) fn render(
    workflow: &Workflow,
    catalog: &Catalog,
    record: &Record,
    summary: &Summary,
) -> String {
    let page = Page {
        workflow,
        catalog,
        record,
        summary,
    };
    let body: String = [
        page.head(),
        page.samples(),
        page.inputs(),
        page.found(),
        page.strips(),
        page.curves(),
        page.files(),
        page.notes(),
        page.timings(),
        page.parameters(),
    ]
    .concat();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n\
         <title>{}</title>\n<style>\n{}</style>\n</head>\n<body>\n<main>\n{body}<footer>Made by host-demo {}. This page \
         needs nothing from outside; the pictures are in it.</footer>\n</main>\n</body>\n</html>\n",
        escape(&workflow.name),
        include_str!("style.css"),
        env!("CARGO_PKG_VERSION"),
    )
}

struct Page<'a> {
    workflow: &'a Workflow,
    catalog: &'a Catalog,
    record: &'a Record,
    summary: &'a Summary,
}

impl<'a> Page<'a> {
    fn node(&self, record: &NodeRecord) -> (NodeId, Option<&'a GraphNode>) {
        let id = NodeId::new(record.label.id.as_str());
        let node = self.workflow.graph.nodes.get(&id);
        (id, node)
    }

    /// The node was given nothing by another: it reads from outside.
    fn is_source(&self, record: &NodeRecord) -> bool {
        self.node(record)
            .1
            .is_some_and(|node| node.links().next().is_none())
    }

    fn paints_prompts(&self, record: &NodeRecord) -> bool {
        captions::own_list(&self.workflow.graph, &self.node(record).0, List::Prompts).is_some()
    }

    /// Batches and conversions of the host would only repeat what others show.
    fn is_of_a_plugin(&self, record: &NodeRecord) -> bool {
        let class = &record.label.class;
        self.catalog
            .plugins()
            .iter()
            .any(|plugin| plugin.nodes.iter().any(|node| node.class == *class))
    }

    fn head(&self) -> String {
        let n_samples: usize = self
            .record
            .nodes
            .iter()
            .filter(|node| self.paints_prompts(node))
            .flat_map(|node| &node.shown)
            .map(|shown| shown.pictures.len())
            .sum();
        let mut figures = vec![(
            "time".to_owned(),
            escape(&clock::duration(self.summary.seconds)),
        )];
        if n_samples > 0 {
            figures.push(("new pictures".to_owned(), n_samples.to_string()));
        }
        // Losses hang on the noise that was drawn: their curves say more than two numbers.
        let charts = curves::charts(&self.record.curves);
        for chart in charts.iter().filter(|chart| chart.is_share()).take(4) {
            if let Some((first, last)) = chart.first_and_last() {
                let [first, last] = [first, last].map(|share| format!("{share:.3}"));
                let figure = if first == last {
                    last
                } else {
                    format!("{last} <small>from {first}</small>")
                };
                figures.push((chart.title.clone(), figure));
            }
        }
        let figures: String = figures
            .iter()
            .map(|(name, value)| format!("<div><dt>{}</dt><dd>{value}</dd></div>\n", escape(name)))
            .collect();
        let plugins: Vec<_> = self
            .catalog
            .plugins()
            .iter()
            .map(|plugin| format!("{} {}", plugin.name, plugin.version))
            .collect();
        let devices: String = self
            .summary
            .devices
            .lines()
            .iter()
            .map(|line| format!(" · {}", escape(line)))
            .collect();
        format!(
            "<header>\n<h1>{}</h1>\n<p class=\"when\">{} · {}{devices}</p>\n<dl class=\"headline\">\n{figures}</dl>\n</header>\n",
            escape(&self.workflow.name),
            clock::iso(self.summary.started)
                .replace('T', " ")
                .replace('Z', " UTC"),
            escape(&plugins.join(", ")),
        )
    }

    fn samples(&self) -> String {
        let samples = self
            .record
            .nodes
            .iter()
            .filter(|node| self.paints_prompts(node));
        let grids: String = samples
            .map(|node| self.outputs(node, "grid", |shown| shown.port == picture_ports::IMAGE))
            .collect();
        section(
            "samples",
            "New pictures",
            "Painted from prompts with the learned tokens",
            &grids,
        )
    }

    fn inputs(&self) -> String {
        let mut figures = String::new();
        for record in self.record.nodes.iter().filter(|node| self.is_source(node)) {
            for shown in record.shown.iter().filter(|shown| !shown.is_blank) {
                for picture in &shown.pictures {
                    figures.push_str(&figure(picture, &self.source_caption(record)));
                }
            }
        }
        section("inputs", "What went in", "", &grid("small", "", &figures))
    }

    /// A source's title, and its file if it names one.
    fn source_caption(&self, record: &NodeRecord) -> String {
        let file = self
            .node(record)
            .1
            .and_then(|node| match node.inputs.get("image") {
                Some(Input::Value(serde_json::Value::String(file))) => Some(file.clone()),
                _ => None,
            });
        match file {
            Some(file) if record.label.title == record.label.class => file,
            Some(file) => format!("{}: {file}", record.label.title),
            None => record.label.title.clone(),
        }
    }

    fn found(&self) -> String {
        let shows = |node: &&NodeRecord| {
            self.is_of_a_plugin(node) && !self.is_source(node) && !self.paints_prompts(node)
        };
        let grids: String = self
            .record
            .nodes
            .iter()
            .filter(shows)
            .map(|node| self.outputs(node, "small sharp", |shown| !shown.is_blank))
            .collect();
        section(
            "found",
            "What was found",
            "Masks and attention of every concept at the end",
            &grids,
        )
    }

    fn outputs(
        &self,
        record: &NodeRecord,
        class: &str,
        keep: impl Fn(&ShownOutput) -> bool,
    ) -> String {
        let (id, _) = self.node(record);
        let mut html = String::new();
        for shown in record.shown.iter().filter(|shown| keep(shown)) {
            let list = if self.paints_prompts(record) {
                List::Prompts
            } else {
                List::Concepts
            };
            let captions =
                captions::of_batch(&self.workflow.graph, &id, shown.pictures.len(), list);
            let figures: String = shown
                .pictures
                .iter()
                .zip(&captions)
                .map(|(picture, caption)| figure(picture, caption))
                .collect();
            html.push_str(&grid(
                class,
                &format!("{} · {}", record.label.title, shown.name),
                &figures,
            ));
        }
        html
    }

    fn strips(&self) -> String {
        let mut strips = String::new();
        for strip in &self.record.strips {
            let figures: String = strip
                .frames
                .iter()
                .map(|frame| figure(&frame.picture, &frame.label))
                .collect();
            let heading = if strip.series == strip.node.title {
                strip.series.clone()
            } else {
                format!("{} · {}", strip.node.title, strip.series)
            };
            strips.push_str(&grid("strip", &heading, &figures));
        }
        section(
            "strips",
            "How it went",
            "From left to right in the order of time",
            &strips,
        )
    }

    fn curves(&self) -> String {
        let charts = curves::charts(&self.record.curves);
        let drawn = charts.iter().map(|chart| {
            let legend: String = chart
                .legend()
                .iter()
                .map(|(color, name)| format!("<span><i style=\"background:{color}\"></i>{}</span>", escape(name)))
                .collect();
            format!(
                "<div><div class=\"chart-title\">{}</div>{}<div class=\"legend\">{legend}</div></div>\n",
                escape(&chart.title),
                chart.svg()
            )
        });
        section(
            "curves",
            "Curves",
            "",
            &grid("charts", "", &drawn.collect::<String>()),
        )
    }

    fn files(&self) -> String {
        let mut items = String::new();
        for (_, path) in &self.record.files {
            let path = path.to_string_lossy().replace('\\', "/");
            // Writing to a string cannot fail.
            let _ = writeln!(
                items,
                "<li><a href=\"{0}\">{1}</a></li>",
                escape(&link(&path)),
                escape(&path)
            );
        }
        let list = if items.is_empty() {
            String::new()
        } else {
            format!("<ul>\n{items}</ul>\n")
        };
        section(
            "files",
            "Files",
            "Beside this page. Pictures carry the workflow: drop one on the editor",
            &list,
        )
    }

    fn notes(&self) -> String {
        let line = |line: &crate::recorder::LogLine| {
            let kind = if line.is_warning { "⚠ " } else { "" };
            format!(
                "<li>{kind}{}: {}</li>\n",
                escape(&line.node.title),
                escape(&line.text)
            )
        };
        let items: String = self.record.log.iter().map(line).collect();
        let list = if items.is_empty() {
            String::new()
        } else {
            format!("<ul>\n{items}</ul>\n")
        };
        section("notes", "Notes", "", &list)
    }

    fn timings(&self) -> String {
        let head = ["node", "class", "time"].map(str::to_owned).to_vec();
        let row = |node: &NodeRecord| {
            let time = node
                .seconds
                .map_or_else(|| "from the cache".to_owned(), clock::duration);
            vec![
                format!("{} {}", node.label.id, node.label.title),
                node.label.class.clone(),
                time,
            ]
        };
        let rows: Vec<_> = std::iter::once(head)
            .chain(self.record.nodes.iter().map(row))
            .collect();
        section("timings", "Times", "", &table("timings", &rows))
    }

    fn parameters(&self) -> String {
        let head = ["node", "parameter", "value"].map(str::to_owned).to_vec();
        let mut rows = vec![head];
        for (id, node) in &self.workflow.graph.nodes {
            let Some(descriptor) = self.catalog.descriptor(&node.class) else {
                continue;
            };
            for (name, value) in descriptor.completed_parameters(&node.parameters()) {
                let value = value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned);
                rows.push(vec![format!("{id} {}", node.title), name, value]);
            }
        }
        let table = format!(
            "<details><summary>All parameters</summary>\n{}</details>\n",
            table("parameters", &rows)
        );
        section(
            "parameters",
            "Workflow",
            "The same graph is in workflow.json",
            &table,
        )
    }
}

/// A path as a link: what has a meaning in one is written as bytes.
fn link(path: &str) -> String {
    let mut out = String::new();
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}
