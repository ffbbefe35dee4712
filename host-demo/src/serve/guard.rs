//! Who is let in. A web page that the user happens to look at can send requests to this machine too, so the address
//! alone proves nothing.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::header::{
    AUTHORIZATION, CONTENT_TYPE, COOKIE, HOST, ORIGIN, SET_COOKIE, USER_AGENT,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::Server;
use super::answer::refuse;
use std::sync::Arc;

const COOKIE_NAME: &str = "conceptloom_token";
/// Shorter tokens can be guessed.
const MIN_TOKEN: usize = 16;

/// The server cannot be started in this way.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuardError {
    #[error(
        "--listen {0} lets other machines in, so it needs --token with at least {MIN_TOKEN} characters that nobody guesses"
    )]
    NoToken(IpAddr),
    #[error("the token has to have at least {MIN_TOKEN} characters, only letters, digits, - and _")]
    BadToken,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Guard {
    token: Option<String>,
    /// Only this machine can connect.
    is_loopback: bool,
    /// Other names of this machine that requests may use.
    hosts: Vec<String>,
}

impl Guard {
    /// The rules for a server that listens on this address.
    ///
    /// # Errors
    /// See [`GuardError`].
    pub(crate) fn new(
        listen: IpAddr,
        token: Option<String>,
        hosts: Vec<String>,
    ) -> Result<Self, GuardError> {
        let is_loopback = listen.is_loopback();
        match &token {
            None if !is_loopback => return Err(GuardError::NoToken(listen)),
            Some(token) if token.len() < MIN_TOKEN || !token.bytes().all(is_plain) => {
                return Err(GuardError::BadToken);
            }
            _ => {}
        }
        Ok(Self {
            token,
            is_loopback,
            hosts,
        })
    }

    /// What the printed address ends with.
    pub(crate) fn token_query(&self) -> String {
        self.token
            .as_ref()
            .map(|token| format!("&token={token}"))
            .unwrap_or_default()
    }

    /// Why a request is refused.
    fn objection(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Option<(StatusCode, &'static str)> {
        let text = |name| {
            headers
                .get(name)
                .map(|value| value.to_str().unwrap_or_default())
        };
        let Some(host) = text(HOST) else {
            return Some((StatusCode::BAD_REQUEST, "the request names no host"));
        };
        // A foreign name that was made to point here would reach us as a page of its own origin.
        if self.is_loopback && !is_local(host) && !self.is_allowed(host) {
            return Some((
                StatusCode::FORBIDDEN,
                "this server answers only as localhost; --allow-host NAME adds a name",
            ));
        }
        if let Some(origin) = text(ORIGIN)
            && origin.split_once("://").map(|(_, authority)| authority) != Some(host)
        {
            return Some((StatusCode::FORBIDDEN, "requests of other sites are refused"));
        }
        let site = headers
            .get("sec-fetch-site")
            .and_then(|site| site.to_str().ok());
        if site == Some("cross-site") && path != "/" {
            return Some((StatusCode::FORBIDDEN, "requests of other sites are refused"));
        }
        let takes_other = ["/upload/", "/userdata/"]
            .iter()
            .any(|part| path.contains(part));
        let has_body = headers
            .get("content-length")
            .is_some_and(|length| length != "0")
            || headers.contains_key("transfer-encoding");
        let is_json = text(CONTENT_TYPE).is_some_and(|kind| {
            kind.split(';')
                .next()
                .is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
        });
        // A page can make a browser send other bodies without being asked for leave. `comfy-cli` posts JSON under
        // another name; it is no browser, and says so.
        let may_be_page = ["origin", "referer", "sec-fetch-site", "cookie"]
            .iter()
            .any(|name| headers.contains_key(*name))
            || text(USER_AGENT).is_none_or(|agent| agent.starts_with("Mozilla/"));
        if method == Method::POST && has_body && !takes_other && !is_json && may_be_page {
            let message = "the body has to be JSON, with the header content-type: application/json";
            return Some((StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        None
    }

    fn is_allowed(&self, host: &str) -> bool {
        let name = name_of(host);
        self.hosts
            .iter()
            .any(|allowed| allowed.eq_ignore_ascii_case(name))
    }

    /// Whether the request carries the token; with whether it came in the address.
    fn has_token(&self, headers: &HeaderMap, query: &str) -> (bool, bool) {
        let Some(token) = &self.token else {
            return (true, false);
        };
        // Hashes are compared in constant time.
        let is_right =
            |given: &str| blake3::hash(given.as_bytes()) == blake3::hash(token.as_bytes());
        let bearer = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "))
            .is_some_and(is_right);
        let basic = password(headers).is_some_and(|password| is_right(&password));
        let cookie = headers
            .get_all(COOKIE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.trim().split_once('='))
            .any(|(name, value)| name == COOKIE_NAME && is_right(value));
        let in_query = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .any(|(name, value)| name == "token" && is_right(value));
        (bearer || basic || cookie || in_query, in_query)
    }
}

/// The password of HTTP's Basic authentication; the user may be anybody.
fn password(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let pair = STANDARD.decode(value.strip_prefix("Basic ")?.trim()).ok()?;
    let (_, password) = std::str::from_utf8(&pair).ok()?.split_once(':')?;
    Some(password.to_owned())
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

/// The name in a `Host`, without its port.
fn name_of(host: &str) -> &str {
    match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    }
}

/// Whether a `Host` names this machine.
fn is_local(host: &str) -> bool {
    let name = name_of(host);
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Lets a request through or answers it.
pub(crate) async fn check(
    State(server): State<Arc<Server>>,
    request: Request,
    next: Next,
) -> Response {
    let guard = &server.guard;
    let (uri, headers) = (request.uri(), request.headers());
    if let Some((status, message)) = guard.objection(request.method(), uri.path(), headers) {
        return refuse(status, "refused", message);
    }
    let (is_known, in_query) = guard.has_token(headers, uri.query().unwrap_or_default());
    if !is_known {
        let message = "this server needs its token: open the address that it printed, or send the header Authorization: Bearer TOKEN";
        return refuse(StatusCode::UNAUTHORIZED, "no_token", message);
    }
    let mut response = next.run(request).await.into_response();
    let headers = response.headers_mut();
    headers.insert(
        "x-content-type-options",
        HeaderValue::from_static("nosniff"),
    );
    headers.insert("referrer-policy", HeaderValue::from_static("no-referrer"));
    headers
        .entry("content-security-policy")
        .or_insert(HeaderValue::from_static("frame-ancestors 'self'"));
    if in_query && let Some(token) = &guard.token {
        let cookie = format!("{COOKIE_NAME}={token}; Path=/; HttpOnly; SameSite=Strict");
        if let Ok(cookie) = HeaderValue::from_str(&cookie) {
            headers.append(SET_COOKIE, cookie);
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect()
    }

    fn status(method: Method, pairs: &[(&'static str, &str)]) -> Option<u16> {
        let named = vec!["host.docker.internal".to_owned()];
        let guard = Guard::new(Ipv4Addr::LOCALHOST.into(), None, named).unwrap();
        guard
            .objection(&method, "/prompt", &headers(pairs))
            .map(|(status, _)| status.as_u16())
    }

    #[test]
    fn foreign_hosts_and_origins_are_refused() {
        let local = ("host", "127.0.0.1:8188");
        for host in [
            "localhost:8188",
            "127.0.0.1",
            "[::1]:8188",
            "LOCALHOST",
            "host.docker.internal:8188",
        ] {
            assert_eq!(status(Method::GET, &[("host", host)]), None, "{host}");
        }
        for host in [
            "evil.example:8188",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "10.0.0.1",
        ] {
            assert_eq!(status(Method::GET, &[("host", host)]), Some(403), "{host}");
        }
        assert_eq!(status(Method::GET, &[]), Some(400));
        assert_eq!(
            status(Method::POST, &[local, ("origin", "http://127.0.0.1:8188")]),
            None
        );
        for origin in [
            "null",
            "http://evil.example",
            "http://127.0.0.1:9999",
            "http://localhost:8188",
        ] {
            assert_eq!(
                status(Method::POST, &[local, ("origin", origin)]),
                Some(403),
                "{origin}"
            );
        }
        assert_eq!(
            status(Method::GET, &[local, ("sec-fetch-site", "cross-site")]),
            Some(403)
        );
    }

    #[test]
    fn a_body_that_a_form_can_send_is_refused() {
        let local = ("host", "localhost");
        let body = ("content-length", "2");
        for kind in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "application/jsonp",
        ] {
            assert_eq!(
                status(Method::POST, &[local, body, ("content-type", kind)]),
                Some(415),
                "{kind}"
            );
        }
        assert_eq!(status(Method::POST, &[local, body]), Some(415));
        let json = ("content-type", "application/json; charset=utf-8");
        assert_eq!(status(Method::POST, &[local, body, json]), None);
        assert_eq!(status(Method::POST, &[local]), None);
        let form = ("content-type", "application/x-www-form-urlencoded");
        let agent = |agent| status(Method::POST, &[local, body, form, ("user-agent", agent)]);
        assert_eq!(agent("Python-urllib/3.11"), None);
        assert_eq!(agent("Mozilla/5.0 (X11; Linux x86_64)"), Some(415));
    }

    #[test]
    fn other_addresses_need_a_token_which_four_ways_carry() {
        let all = IpAddr::from(Ipv4Addr::UNSPECIFIED);
        assert!(matches!(
            Guard::new(all, None, Vec::new()),
            Err(GuardError::NoToken(_))
        ));
        assert!(matches!(
            Guard::new(all, Some("short".into()), Vec::new()),
            Err(GuardError::BadToken)
        ));
        let guard = Guard::new(all, Some("0123456789abcdef".into()), Vec::new()).unwrap();
        let bearer = headers(&[("authorization", "Bearer 0123456789abcdef")]);
        let cookie = headers(&[("cookie", "a=b; conceptloom_token=0123456789abcdef")]);
        let wrong = headers(&[("authorization", "Bearer 0123456789abcdee")]);
        // user:0123456789abcdef
        let basic = headers(&[("authorization", "Basic dXNlcjowMTIzNDU2Nzg5YWJjZGVm")]);
        assert_eq!(guard.has_token(&bearer, ""), (true, false));
        assert_eq!(guard.has_token(&basic, ""), (true, false));
        assert_eq!(guard.has_token(&cookie, ""), (true, false));
        assert_eq!(
            guard.has_token(&wrong, "x=1&token=0123456789abcdef"),
            (true, true)
        );
        assert_eq!(guard.has_token(&wrong, "token=1"), (false, false));
    }
}
