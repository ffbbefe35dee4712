//! Taking in what is to be run.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::super::Server;
use super::super::answer::{bad_request, ok, refuse, refuse_nodes};
use super::super::job::{Job, number_json};
use super::super::queue::AcceptError;
use super::{blocking, either, json_body};
use crate::catalog::Catalog;
use crate::clock::now_ms;
use crate::demo;
use crate::graph::{Graph, Input, NodeId};
use crate::object_info;
use crate::validate::{Verdict, judge};
use crate::workflow_file::{MAX_NODES, Workflow, is_editors};

/// `POST /prompt`.
pub(crate) async fn accept(State(server): State<Arc<Server>>, request: Request) -> Response {
    let body = match json_body(request).await {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    let answer = blocking(move || either(take_in(&server, body))).await;
    either(answer)
}

/// `POST /conceptloom/run {"workflow": name}`: a saved or the bundled workflow, from the plain page.
pub(crate) async fn run_workflow(State(server): State<Arc<Server>>, request: Request) -> Response {
    let body = match json_body(request).await {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    let answer = blocking(move || {
        let name = body
            .get("workflow")
            .and_then(Value::as_str)
            .unwrap_or(demo::NAME);
        let bytes = if name == demo::NAME {
            demo::WORKFLOW.as_bytes().to_vec()
        } else {
            let path = server.folders.user.file(&format!("workflows/{name}"));
            let path = path.map_err(|error| bad_request(&error.to_string()))?;
            std::fs::read(path).map_err(|error| {
                bad_request(&format!("the workflow {name} cannot be read: {error}"))
            })?
        };
        let workflow = Workflow::parse(name, &bytes, &server.catalog);
        let workflow = workflow.map_err(|error| bad_request(&error.to_string()))?;
        let mut request = Map::new();
        request.insert(
            "client_id".to_owned(),
            body.get("client_id").cloned().unwrap_or_default(),
        );
        request.insert("prompt".to_owned(), workflow.graph.to_api());
        if let Some(editor) = workflow.editor {
            request.insert(
                "extra_data".to_owned(),
                json!({"extra_pnginfo": {"workflow": editor}}),
            );
        }
        take_in(&server, request)
    });
    either(answer.await.map(either))
}

fn take_in(server: &Server, mut body: Map<String, Value>) -> Result<Response, Response> {
    let prompt = body.remove("prompt").filter(|prompt| !prompt.is_null());
    let Some(prompt) = prompt else {
        return Err(refuse(
            StatusCode::BAD_REQUEST,
            "no_prompt",
            "the request has no \"prompt\"",
        ));
    };
    let prompt = in_api_form(server, prompt, &mut body)?;
    let graph = graph_of(&prompt)?;
    let wanted = body
        .get("partial_execution_targets")
        .and_then(Value::as_array)
        .map(|targets| {
            let names = targets.iter().filter_map(Value::as_str);
            names.map(NodeId::new).collect::<Vec<_>>()
        });
    let verdict = judge(&graph, &server.catalog, wanted.as_deref());
    let errors = node_errors(&graph, &server.catalog, &verdict);
    if let Some((kind, message)) = refusal(&verdict) {
        return Err(refuse_nodes(
            StatusCode::BAD_REQUEST,
            kind,
            &message,
            errors,
        ));
    }
    let job = Job {
        id: prompt_id(body.get("prompt_id"))?,
        client_id: body
            .get("client_id")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned(),
        extra_data: extra_data(&mut body),
        prompt,
        outputs: verdict.outputs.iter().map(ToString::to_string).collect(),
        created_ms: now_ms(),
        ..Job::default()
    };
    let id = job.id.clone();
    let number = body.get("number").and_then(Value::as_f64);
    let front = body
        .get("front")
        .and_then(Value::as_bool)
        .unwrap_or_default();
    let number = server.queue.accept(job, number, front).map_err(|error| {
        let (status, code) = match error {
            AcceptError::Used => (StatusCode::BAD_REQUEST, "invalid_prompt_id"),
            AcceptError::Journal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "cannot_write"),
        };
        refuse(status, code, &error.to_string())
    })?;
    server.tell_status();
    let number = number_json(number);
    Ok(ok(
        &json!({"prompt_id": id, "number": number, "node_errors": errors}),
    ))
}

/// The prompt as the API takes it: people post what the editor saved, too.
fn in_api_form(
    server: &Server,
    prompt: Value,
    body: &mut Map<String, Value>,
) -> Result<Value, Response> {
    if !is_editors(&prompt) {
        return Ok(prompt);
    }
    let workflow = Workflow::of_document("prompt", prompt, &server.catalog).map_err(|error| {
        refuse(
            StatusCode::BAD_REQUEST,
            "invalid_prompt",
            &error.to_string(),
        )
    })?;
    let extra = body.entry("extra_data").or_insert_with(|| json!({}));
    if let Some(extra) = extra.as_object_mut() {
        extra
            .entry("extra_pnginfo")
            .or_insert_with(|| json!({"workflow": workflow.editor}));
    }
    Ok(workflow.graph.to_api())
}

fn graph_of(prompt: &Value) -> Result<Graph, Response> {
    let invalid = |message: &str| refuse(StatusCode::BAD_REQUEST, "invalid_prompt", message);
    let Some(document) = prompt.as_object() else {
        return Err(invalid("the prompt is no JSON object of nodes"));
    };
    if document.len() > MAX_NODES {
        let message = format!(
            "the prompt has {} nodes, at most {MAX_NODES} are run",
            document.len()
        );
        return Err(invalid(&message));
    }
    Graph::from_api(document).map_err(|error| invalid(&error))
}

/// A client may choose the id, as a UUID in its canonical form.
fn prompt_id(given: Option<&Value>) -> Result<String, Response> {
    let Some(given) = given.filter(|given| !given.is_null()) else {
        return Ok(Uuid::new_v4().to_string());
    };
    let text = given.as_str().unwrap_or_default();
    let is_canonical = Uuid::try_parse(text).is_ok_and(|id| id.to_string() == text);
    if is_canonical {
        return Ok(text.to_owned());
    }
    let message = "prompt_id has to be a UUID in lower case";
    Err(refuse(
        StatusCode::BAD_REQUEST,
        "invalid_prompt_id",
        message,
    ))
}

fn extra_data(body: &mut Map<String, Value>) -> Value {
    let mut data = match body.remove("extra_data") {
        Some(Value::Object(data)) => data,
        _ => Map::new(),
    };
    // Keys to somebody else's service, which no node here asks for, and which lists would show to everybody.
    for key in ["auth_token_comfy_org", "api_key_comfy_org"] {
        data.remove(key);
    }
    if let Some(client) = body.get("client_id") {
        data.insert("client_id".to_owned(), client.clone());
    }
    Value::Object(data)
}

/// Why nothing of it runs.
fn refusal(verdict: &Verdict) -> Option<(&'static str, String)> {
    let of_graph = verdict.problems.iter().find(|problem| {
        let code = problem.code.as_str();
        code == "invalid_prompt" || code == "prompt_no_outputs"
    });
    match of_graph {
        Some(problem) if problem.code == "invalid_prompt" => {
            Some(("invalid_prompt", problem.message.clone()))
        }
        Some(problem) => Some(("prompt_no_outputs", problem.message.clone())),
        None if verdict.outputs.is_empty() => {
            let all: Vec<_> = verdict.problems.iter().map(ToString::to_string).collect();
            Some(("prompt_outputs_failed_validation", all.join("\n")))
        }
        None => None,
    }
}

/// `{id: {"class_type", "errors", "dependent_outputs"}}`.
fn node_errors(graph: &Graph, catalog: &Catalog, verdict: &Verdict) -> Map<String, Value> {
    let mut by_node: BTreeMap<&NodeId, Vec<Value>> = BTreeMap::new();
    for problem in &verdict.problems {
        let Some((id, class)) = &problem.node else {
            continue;
        };
        let extra = problem
            .input
            .as_ref()
            .map(|input| about_input(graph, catalog, id, class, input));
        by_node.entry(id).or_default().push(json!({
            "type": problem.code, "message": problem.message,
            "details": problem.input.as_deref().unwrap_or_default(), "extra_info": extra.unwrap_or_default(),
        }));
    }
    let entry = |(id, errors): (&NodeId, Vec<Value>)| {
        let dependents: Vec<_> = verdict
            .dependents
            .get(id)
            .into_iter()
            .flatten()
            .map(NodeId::as_str)
            .collect();
        let class = graph.nodes.get(id).map(|node| node.class.as_str());
        let entry = json!({"class_type": class, "errors": errors, "dependent_outputs": dependents});
        (id.to_string(), entry)
    };
    by_node.into_iter().map(entry).collect()
}

/// What an input takes, and what stands there.
fn about_input(
    graph: &Graph,
    catalog: &Catalog,
    id: &NodeId,
    class: &str,
    input: &str,
) -> Map<String, Value> {
    let mut about = Map::from_iter([("input_name".to_owned(), json!(input))]);
    let config = catalog
        .descriptor(class)
        .and_then(|class| object_info::input(class, input));
    about.extend(config.map(|config| ("input_config".to_owned(), config)));
    match graph.nodes.get(id).and_then(|node| node.inputs.get(input)) {
        Some(Input::Value(value)) => {
            about.insert("received_value".to_owned(), value.clone());
        }
        Some(Input::Link { node, output }) => {
            let link = json!([node.as_str(), output]);
            about.insert("received_value".to_owned(), link.clone());
            about.insert("linked_node".to_owned(), link);
            let source = graph.nodes.get(node);
            let source = source.and_then(|source| catalog.descriptor(&source.class));
            let socket = source.and_then(|source| source.outputs.get(*output));
            about.extend(socket.map(|socket| ("received_type".to_owned(), json!(socket.port))));
        }
        None => {}
    }
    about
}
