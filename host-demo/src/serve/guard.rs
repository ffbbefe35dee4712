//! Who is let in. A web page that the user happens to look at can send requests to this machine too, so the address
//! alone proves nothing.
//!
//! Where there is a token, it stands in no address that stays: the printed one has none, a browser asks for it as for a password
//! (HTTP Basic) and gets a cookie, and a page that was asked for with `?token=` is asked for again without.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, COOKIE, HOST, LOCATION, ORIGIN, SET_COOKIE, USER_AGENT,
    WWW_AUTHENTICATE,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::Server;
use super::answer::refuse;
use std::sync::Arc;

const COOKIE_NAME: &str = "conceptloom_token";
/// Its name in an address.
const IN_QUERY: &str = "token";
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

/// What clients have to know. It is never written anywhere, not even for a developer.
pub(crate) struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    /// Compares in a time that says nothing: [`blake3::Hash`] promises so.
    fn is(&self, given: &str) -> bool {
        blake3::hash(given.as_bytes()) == blake3::hash(self.0.as_bytes())
    }
}

impl std::str::FromStr for Token {
    type Err = GuardError;

    fn from_str(text: &str) -> Result<Self, GuardError> {
        if text.len() < MIN_TOKEN || !text.bytes().all(is_plain) {
            return Err(GuardError::BadToken);
        }
        Ok(Self(text.to_owned()))
    }
}

/// How a request carries the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// By a header of a program, or a browser's cookie; or none is asked for.
    Header,
    /// As a password that a person typed.
    Password,
    /// In the address.
    Address,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Guard {
    token: Option<Token>,
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
        token: Option<&str>,
        hosts: Vec<String>,
    ) -> Result<Self, GuardError> {
        let is_loopback = listen.is_loopback();
        if token.is_none() && !is_loopback {
            return Err(GuardError::NoToken(listen));
        }
        let token = token.map(str::parse).transpose()?;
        Ok(Self {
            token,
            is_loopback,
            hosts,
        })
    }

    /// Whether a token is asked for.
    pub(crate) fn asks(&self) -> bool {
        self.token.is_some()
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
        // another name; it is no browser, and says so. ComfyUI's editor does too, and its origin is this server.
        let may_be_page = ["referer", "sec-fetch-site", "cookie"]
            .iter()
            .any(|name| headers.contains_key(*name))
            || text(USER_AGENT).is_none_or(|agent| agent.starts_with("Mozilla/"));
        // Another origin was refused above, and no page can set the other header.
        let is_own_page = headers.contains_key(ORIGIN) || site == Some("same-origin");
        if method == Method::POST
            && has_body
            && !takes_other
            && !is_json
            && may_be_page
            && !is_own_page
        {
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

    /// How the request carries the token; `None` if it does not.
    fn known(&self, headers: &HeaderMap, query: &str) -> Option<Known> {
        let Some(token) = &self.token else {
            return Some(Known::Header);
        };
        let is_bearer = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "))
            .is_some_and(|given| token.is(given));
        let is_cookie = headers
            .get_all(COOKIE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.trim().split_once('='))
            .any(|(name, value)| name == COOKIE_NAME && token.is(value));
        let is_password = password(headers).is_some_and(|password| token.is(&password));
        let in_address = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .any(|(name, value)| name == IN_QUERY && token.is(value));
        // The address first: whatever else the request carries, it is not to stay there.
        match () {
            () if in_address => Some(Known::Address),
            () if is_bearer || is_cookie => Some(Known::Header),
            () if is_password => Some(Known::Password),
            () => None,
        }
    }

    /// What has the browser keep the token.
    fn cookie(&self) -> Option<HeaderValue> {
        let Token(token) = self.token.as_ref()?;
        let cookie = format!("{COOKIE_NAME}={token}; Path=/; HttpOnly; SameSite=Strict");
        let mut cookie = HeaderValue::from_str(&cookie).ok()?;
        cookie.set_sensitive(true);
        Some(cookie)
    }
}

/// Where a page is asked for again, without the token in its address.
fn without_token(uri: &Uri) -> String {
    let is_token = |pair: &&str| pair.split('=').next() == Some(IN_QUERY);
    let query = uri.query().unwrap_or_default().split('&');
    let rest: Vec<_> = query.filter(|pair| !is_token(pair)).collect();
    // One slash at the start: two would be another site.
    let path = uri.path().trim_start_matches('/');
    if rest.is_empty() {
        format!("/{path}")
    } else {
        format!("/{path}?{}", rest.join("&"))
    }
}

/// Whether a browser asks for a page to show.
fn is_page(method: &Method, headers: &HeaderMap) -> bool {
    let accepts = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
    method == Method::GET && accepts.is_some_and(|kinds| kinds.contains("text/html"))
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
    let is_page = is_page(request.method(), headers);
    let Some(known) = guard.known(headers, uri.query().unwrap_or_default()) else {
        let message = "this server needs its token: as the password of HTTP Basic, or in the header Authorization: Bearer TOKEN";
        let mut response = refuse(StatusCode::UNAUTHORIZED, "no_token", message);
        if is_page {
            // Has the browser ask; the user may be anybody.
            let ask = HeaderValue::from_static(
                "Basic realm=\"conceptloom: any user, the token as password\", charset=\"UTF-8\"",
            );
            response.headers_mut().insert(WWW_AUTHENTICATE, ask);
        }
        return response;
    };
    let mut response = match (known, HeaderValue::from_str(&without_token(uri))) {
        (Known::Address, Ok(there)) if is_page => {
            (StatusCode::SEE_OTHER, [(LOCATION, there)]).into_response()
        }
        _ => next.run(request).await.into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(
        "x-content-type-options",
        HeaderValue::from_static("nosniff"),
    );
    headers.insert("referrer-policy", HeaderValue::from_static("no-referrer"));
    headers
        .entry("content-security-policy")
        .or_insert(HeaderValue::from_static("frame-ancestors 'self'"));
    if is_page
        && known != Known::Header
        && let Some(cookie) = guard.cookie()
    {
        headers.append(SET_COOKIE, cookie);
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
        let of = |origin| {
            let agent = ("user-agent", "Mozilla/5.0");
            status(
                Method::POST,
                &[local, body, form, agent, ("origin", origin)],
            )
        };
        assert_eq!(of("http://localhost"), None, "the editor's");
        let own = ("sec-fetch-site", "same-origin");
        assert_eq!(status(Method::POST, &[local, body, form, own]), None);
        for foreign in ["null", "", "http://evil.example", "http://localhost:1"] {
            assert_eq!(of(foreign), Some(403), "{foreign}");
        }
    }

    #[test]
    fn other_addresses_need_a_token_which_four_ways_carry() {
        let all = IpAddr::from(Ipv4Addr::UNSPECIFIED);
        assert!(matches!(
            Guard::new(all, None, Vec::new()),
            Err(GuardError::NoToken(_))
        ));
        assert!(matches!(
            Guard::new(all, Some("short"), Vec::new()),
            Err(GuardError::BadToken)
        ));
        let guard = Guard::new(all, Some("0123456789abcdef"), Vec::new()).unwrap();
        let bearer = headers(&[("authorization", "Bearer 0123456789abcdef")]);
        let cookie = headers(&[("cookie", "a=b; conceptloom_token=0123456789abcdef")]);
        let wrong = headers(&[("authorization", "Bearer 0123456789abcdee")]);
        // user:0123456789abcdef
        let basic = headers(&[("authorization", "Basic dXNlcjowMTIzNDU2Nzg5YWJjZGVm")]);
        assert_eq!(guard.known(&bearer, ""), Some(Known::Header));
        assert_eq!(guard.known(&cookie, ""), Some(Known::Header));
        assert_eq!(guard.known(&basic, ""), Some(Known::Password));
        let query = "x=1&token=0123456789abcdef";
        assert_eq!(guard.known(&wrong, query), Some(Known::Address));
        assert_eq!(guard.known(&cookie, query), Some(Known::Address));
        assert_eq!(guard.known(&wrong, "token=1"), None);
        assert!(!format!("{guard:?}").contains("0123456789abcdef"));
    }

    #[test]
    fn an_address_with_the_token_leads_to_the_same_one_without() {
        for (given, expected) in [
            ("/?token=a", "/"),
            ("/?x=1&token=a&y=2", "/?x=1&y=2"),
            ("//evil.example/?token=a", "/evil.example/"),
            ("/a?tokens=1", "/a?tokens=1"),
        ] {
            assert_eq!(without_token(&given.parse().unwrap()), expected, "{given}");
        }
    }
}
