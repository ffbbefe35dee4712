//! Small pieces of HTML. Everything that is text goes through [`escape`].

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::pictures::RgbPicture;

/// Text that stands in HTML as itself.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// A picture inside of the page. Small ones are shown with sharp pixels.
fn picture(picture: &RgbPicture, alt: &str) -> String {
    let data = STANDARD.encode(super::png(picture));
    let (width, height) = (picture.width, picture.height);
    format!(
        "<img width=\"{width}\" height=\"{height}\" alt=\"{}\" src=\"data:image/png;base64,{data}\">",
        escape(alt)
    )
}

/// A picture with a caption.
pub(super) fn figure(shown: &RgbPicture, caption: &str) -> String {
    let text = if caption.is_empty() {
        String::new()
    } else {
        format!("<figcaption>{}</figcaption>", escape(caption))
    };
    format!("<figure>{}{text}</figure>\n", picture(shown, caption))
}

/// A titled part of the page; nothing if it has no content.
pub(super) fn section(id: &str, title: &str, lead: &str, content: &str) -> String {
    if content.is_empty() {
        return String::new();
    }
    let lead = if lead.is_empty() {
        String::new()
    } else {
        format!("<p class=\"lead\">{}</p>\n", escape(lead))
    };
    format!(
        "<section id=\"{id}\">\n<h2>{}</h2>\n{lead}{content}</section>\n",
        escape(title)
    )
}

/// Figures in a grid, under a small heading if there is one.
pub(super) fn grid(class: &str, heading: &str, figures: &str) -> String {
    if figures.is_empty() {
        return String::new();
    }
    let heading = if heading.is_empty() {
        String::new()
    } else {
        format!("<h3>{}</h3>\n", escape(heading))
    };
    format!("{heading}<div class=\"{class}\">\n{figures}</div>\n")
}

/// A table of text; the first row is the head.
pub(super) fn table(class: &str, rows: &[Vec<String>]) -> String {
    let row = |cells: &Vec<String>, tag: &str| {
        let cells: String = cells
            .iter()
            .map(|cell| format!("<{tag}>{}</{tag}>", escape(cell)))
            .collect();
        format!("<tr>{cells}</tr>\n")
    };
    let Some((head, body)) = rows.split_first() else {
        return String::new();
    };
    let body: String = body.iter().map(|cells| row(cells, "td")).collect();
    format!(
        "<table class=\"{class}\">\n<thead>{}</thead>\n<tbody>{body}</tbody>\n</table>\n",
        row(head, "th")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(escape("<b a='x'>&\""), "&lt;b a=&#39;x&#39;&gt;&amp;&quot;");
        let dot = RgbPicture {
            width: 1,
            height: 1,
            pixels: vec![0; 3],
        };
        let html = figure(&dot, "<script>alert(1)</script>");
        assert!(
            !html.contains("<script>") && html.contains("data:image/png;base64,iVBOR"),
            "{html}"
        );
    }
}
