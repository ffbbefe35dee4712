//! Prompts in the words of the bundled model's captions.

/// A background's word, and what follows the objects in a caption.
const BACKGROUNDS: [(&str, &str); 12] = [
    ("beach", "on a beach"),
    ("grass", "on grass"),
    ("sky", "in the night sky"),
    ("forest", "in a forest"),
    ("sea", "in the sea"),
    ("desert", "in a desert"),
    ("snow", "in snow"),
    ("wall", "against a brick wall"),
    ("table", "on a wooden table"),
    ("city", "in a city"),
    ("mountain", "on a mountain"),
    ("room", "in a room"),
];

/// `a photo of a dog, an object and a car on a beach`. A background without a word is not named.
pub(crate) fn prompt(objects: &[&str], background: Option<&str>) -> String {
    let place = background.map_or_else(String::new, |word| {
        let known = BACKGROUNDS.iter().find(|(known, _)| *known == word);
        known.map_or_else(|| format!(" and {word}"), |(_, place)| format!(" {place}"))
    });
    let text = match objects {
        [all @ .., last] if !all.is_empty() => format!("{} and {last}", all.join(", ")),
        _ => objects.concat(),
    };
    format!("a photo of {text}{place}")
}

/// `a dog`, `an object`
pub(crate) fn with_article(word: &str) -> String {
    let article = if word.starts_with(['a', 'e', 'i', 'o', 'u']) {
        "an"
    } else {
        "a"
    };
    format!("{article} {word}")
}
