//! What is built in: the workflow that runs when nothing is asked for, and its pictures.
//!
//! The pictures are composed scenes of the bundled checkpoint's set, with drawings that it never saw: a man by Twitter,
//! Inc and other contributors (Twemoji, CC-BY-4.0) and a cat by Microsoft (Fluent Emoji, MIT); and a dog and a car by
//! Google (Noto Emoji, Apache-2.0), which earlier workflows name. Their masks are the true ones.

/// Name of the bundled workflow.
pub(crate) const NAME: &str = "demo";

/// As the editor saves it.
pub(crate) const WORKFLOW: &str = include_str!("../workflows/demo.json");

macro_rules! pictures {
    ($($name:literal),+ $(,)?) => {
        [$(($name, include_bytes!(concat!("../workflows/pictures/", $name)))),+]
    };
}

/// Pictures by name.
pub(crate) static PICTURES: [(&str, &[u8]); 8] = pictures![
    "man-and-cat.png",
    "man-and-cat-mask-man.png",
    "man-and-cat-mask-cat.png",
    "man-and-cat-mask-table.png",
    "dog-and-car.png",
    "dog-and-car-mask-dog.png",
    "dog-and-car-mask-car.png",
    "dog-and-car-mask-table.png",
];

/// Starts the names of pictures that are built in.
pub(crate) const PREFIX: &str = "demo:";

/// The picture of this name, which starts with [`PREFIX`].
pub(crate) fn picture(name: &str) -> Option<&'static [u8]> {
    let name = name.strip_prefix(PREFIX)?;
    let found = PICTURES.iter().find(|(known, _)| *known == name);
    found.map(|(_, bytes)| *bytes)
}
