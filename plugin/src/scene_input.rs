//! Pictures on a wire and a list of concepts in a text box, to a scene of the method.

use personalization::{Concept, Picture, Role, Scene, ScenePicture, Size};
use plugin_api::host::LogLevel;
use plugin_api::{Host, Inputs, NodeError, SharedTensor};
use stable_diffusion::DiffusionModel;

use crate::ports;

/// A concept and the pictures that show it (0-based; all of them if empty).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ListedConcept {
    concept: Concept,
    pictures: Vec<usize>,
}

/// Reads the text box.
///
/// # Errors
/// An empty list, or the first line that cannot be read.
pub(crate) fn parse_concepts(text: &str) -> Result<Vec<ListedConcept>, NodeError> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let listed = lines.map(parse_line).collect::<Result<Vec<_>, _>>()?;
    if listed.is_empty() {
        return Err(wrong(
            "the list of concepts is empty; write one concept per line, for example: <rex> dog",
        ));
    }
    for (i, one) in listed.iter().enumerate() {
        if listed[..i]
            .iter()
            .any(|other| other.concept.token == one.concept.token)
        {
            let token = &one.concept.token;
            return Err(wrong(format!(
                "the token {token} is listed twice; every concept needs its own"
            )));
        }
    }
    Ok(listed)
}

fn wrong(message: impl Into<String>) -> NodeError {
    NodeError::invalid_input("concept_list", message)
}

fn parse_line(line: &str) -> Result<ListedConcept, NodeError> {
    let (rest, pictures) = match line.split_once('@') {
        None => (line, Vec::new()),
        Some((rest, numbers)) => (rest.trim(), parse_pictures(line, numbers)?),
    };
    let (rest, role) = match rest.strip_suffix("(background)") {
        Some(rest) => (rest.trim(), Role::Background),
        None => (rest, Role::Object),
    };
    let (token, word) = match rest.strip_prefix('<').and_then(|rest| rest.split_once('>')) {
        Some((name, word)) => (format!("<{}>", name.trim()), word.trim()),
        None => (format!("<{}>", rest.replace(' ', "-")), rest),
    };
    if token == "<>" {
        return Err(wrong(format!(
            "the line \"{line}\" has neither a token nor a class word; write for example: <rex> dog"
        )));
    }
    Ok(ListedConcept {
        concept: Concept {
            token,
            class_word: word.to_owned(),
            role,
        },
        pictures,
    })
}

fn parse_pictures(line: &str, numbers: &str) -> Result<Vec<usize>, NodeError> {
    let parse = |number: &str| match number.trim().parse::<usize>() {
        Ok(n) if n >= 1 => Ok(n - 1),
        _ => Err(wrong(format!(
            "\"{line}\": after @ come picture numbers from 1, such as @1,3"
        ))),
    };
    numbers.split(',').map(parse).collect()
}

/// The scene that the input `images` and the list make, at the size at which the model learns such pictures.
///
/// # Errors
/// Values that are no pictures, or a list that names a picture which is not there.
pub(crate) fn scene(
    inputs: &Inputs,
    concepts: &str,
    model: &DiffusionModel,
    host: &Host,
) -> Result<Scene, NodeError> {
    let listed = parse_concepts(concepts)?;
    if let Some(text) = same_word(&listed) {
        host.log(LogLevel::Warning, &text);
    }
    let pictures = pictures_to_learn(inputs, model, host)?;
    let n_pictures = pictures.len();
    if let Some(i) = listed
        .iter()
        .flat_map(|one| &one.pictures)
        .find(|&&i| i >= n_pictures)
    {
        let are = if n_pictures == 1 { "is" } else { "are" };
        return Err(wrong(format!(
            "a concept is listed for picture {}, there {are} {n_pictures}",
            i + 1
        )));
    }
    let shown = |(i, picture): (usize, Picture)| {
        let in_it = |one: &ListedConcept| one.pictures.is_empty() || one.pictures.contains(&i);
        let concepts = (0..listed.len()).filter(|&c| in_it(&listed[c])).collect();
        ScenePicture { picture, concepts }
    };
    let pictures = pictures.into_iter().enumerate().map(shown).collect();
    let concepts = listed.iter().map(|one| one.concept.clone()).collect();
    Scene::new(concepts, pictures).map_err(|error| wrong(error.to_string()))
}

/// What to say of objects that one word stands for, in one picture.
fn same_word(listed: &[ListedConcept]) -> Option<String> {
    let is_same = |a: &ListedConcept, b: &ListedConcept| {
        let word = &a.concept.class_word;
        !word.is_empty() && *word == b.concept.class_word && a.pictures == b.pictures
    };
    let pairs = listed.iter().enumerate();
    let (first, other) = pairs
        .flat_map(|(i, a)| listed[i + 1..].iter().map(move |b| (a, b)))
        .find(|(a, b)| is_same(a, b))?;
    Some(format!(
        "{} and {} are both called {}: they start alike, and which of them learns which is left to chance; words that \
         differ, such as \"brown {}\", or masks say which is meant",
        first.concept.token,
        other.concept.token,
        first.concept.class_word,
        first.concept.class_word
    ))
}

/// The pictures of the input `images`, whole, at the size at which a model learns them; the person is told of it.
///
/// # Errors
/// Values that are no pictures.
pub(crate) fn pictures_to_learn(
    inputs: &Inputs,
    model: &DiffusionModel,
    host: &Host,
) -> Result<Vec<Picture>, NodeError> {
    let images = inputs.tensor("images")?;
    let from = size_of(images)?;
    let size = Picture::size_for(model, from);
    if size != from {
        let text = format!("pictures of {from} pixels are learned whole, not cropped, at {size}");
        host.log(LogLevel::Info, &text);
    }
    pictures(images, size)
}

/// Width and height of the pictures of an `IMAGE`.
///
/// # Errors
/// Something else.
pub(crate) fn size_of(images: &SharedTensor) -> Result<Size, NodeError> {
    let [_, height, width] = ports::image_size("images", images)?;
    Ok(Size::new(width, height))
}

/// The pictures of an `IMAGE` at another size.
///
/// # Errors
/// Values that are no pictures.
pub(crate) fn pictures(images: &SharedTensor, size: Size) -> Result<Vec<Picture>, NodeError> {
    let from = size_of(images)?;
    let values = ports::values("images", images)?;
    let picture = |pixels: &[f32]| {
        Picture::from_unit_f32(from, pixels, size)
            .map_err(|error| NodeError::invalid_input("images", error.to_string()))
    };
    values.chunks_exact(from.area() * 3).map(picture).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<(String, String, Role, Vec<usize>)> {
        let listed = parse_concepts(text).unwrap();
        listed
            .into_iter()
            .map(|one| {
                (
                    one.concept.token,
                    one.concept.class_word,
                    one.concept.role,
                    one.pictures,
                )
            })
            .collect()
    }

    #[test]
    fn lists_are_read_as_people_write_them() {
        let object = |token: &str, word: &str, on: &[usize]| {
            (token.into(), word.into(), Role::Object, on.to_vec())
        };
        assert_eq!(read("dog"), [object("<dog>", "dog", &[])]);
        assert_eq!(
            read(" <rex>  dog \n\n<vw> car @1, 3"),
            [object("<rex>", "dog", &[]), object("<vw>", "car", &[0, 2])]
        );
        // A token alone: what it is has to be found.
        assert_eq!(read("<a>"), [object("<a>", "", &[])]);
        let sea = ("<sea>".into(), "sea".into(), Role::Background, vec![1]);
        assert_eq!(read("<sea> sea (background) @2"), [sea]);
    }

    #[test]
    fn objects_of_one_word_are_told() {
        let told = |text: &str| same_word(&parse_concepts(text).unwrap());
        let text = told("<a> dog\n<b> dog\n<sea> sea (background)").unwrap();
        assert!(text.contains("<a> and <b> are both called dog"), "{text}");
        for text in ["<a> dog\n<b> cat", "<a>\n<b>", "<a> dog @1\n<b> dog @2"] {
            assert_eq!(told(text), None, "{text}");
        }
    }

    #[test]
    fn lists_that_cannot_be_read_say_how_to_write_them() {
        for (text, part) in [
            ("", "one concept per line"),
            ("<>", "neither a token nor a class word"),
            ("<a> dog\n<a> cat", "listed twice"),
            ("dog @0", "picture numbers from 1"),
            ("dog @x", "picture numbers from 1"),
        ] {
            let error = parse_concepts(text).unwrap_err();
            assert!(error.message.contains(part), "{text:?}: {error}");
        }
    }
}
