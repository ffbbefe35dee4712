//! Ids of awkward prompts against transformers' `CLIPTokenizer`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use stable_diffusion::Error;
use stable_diffusion::error::PromptError;
use stable_diffusion::tokenizer::Tokenizer;

use crate::recording::{fixtures, sprites};

#[derive(Deserialize)]
struct Recorded {
    placeholders: Vec<String>,
    sprites: Vocabulary,
    #[serde(rename = "sd2-small")]
    sd2_small: Vocabulary,
}

#[derive(Deserialize)]
struct Vocabulary {
    vocab_size: usize,
    words: BTreeMap<String, Vec<u32>>,
    /// Ids with start and end, or their number if there are more than 77.
    plain: BTreeMap<String, Value>,
    with_placeholders: BTreeMap<String, Value>,
    padded: Vec<u32>,
}

fn load(folder: &Path) -> Tokenizer {
    let read = |file: &str| Ok(std::fs::read(folder.join(file)).ok());
    Tokenizer::from_files(&folder.display().to_string(), read, 77).unwrap()
}

fn check(tokenizer: &Tokenizer, cases: &BTreeMap<String, Value>) {
    for (prompt, expected) in cases {
        match (tokenizer.encode(prompt), expected) {
            (Ok(found), Value::Array(_)) => {
                let expected: Vec<u32> = serde_json::from_value(expected.clone()).unwrap();
                assert_eq!(found.ids[..found.n_tokens], expected, "{prompt:?}");
            }
            (Err(Error::Prompt(PromptError::TooLong { tokens, limit: 77 })), expected) => {
                assert_eq!(Value::from(tokens), *expected, "{prompt:?}");
            }
            (found, _) => panic!("{prompt:?} gives {found:?} and should give {expected}"),
        }
    }
}

#[test]
fn ids_are_those_of_transformers() {
    let json = std::fs::read(fixtures().join("tokenizer.json")).unwrap();
    let recorded: Recorded = serde_json::from_slice(&json).unwrap();
    for (folder, vocabulary) in [
        (sprites(), &recorded.sprites),
        (fixtures().join("sd2-small"), &recorded.sd2_small),
    ] {
        let tokenizer = load(&folder.join("tokenizer"));
        assert_eq!(
            tokenizer.base_vocab_size(),
            vocabulary.vocab_size,
            "{folder:?}: re-record with tests/reference/record.sh"
        );
        check(&tokenizer, &vocabulary.plain);
        for (word, expected) in &vocabulary.words {
            assert_eq!(&tokenizer.word_ids(word).unwrap(), expected, "{word}");
        }
        let with = tokenizer.with_placeholders(&recorded.placeholders).unwrap();
        check(&with, &vocabulary.with_placeholders);
        assert_eq!(with.encode("a dog").unwrap().ids, vocabulary.padded);
        let ids: Vec<_> = recorded
            .placeholders
            .iter()
            .map(|p| with.id_of(p).unwrap() as usize)
            .collect();
        let base = vocabulary.vocab_size;
        assert_eq!(ids, (base..base + ids.len()).collect::<Vec<_>>());
    }
}

#[test]
fn tokenizer_json_and_vocab_with_merges_are_the_same() {
    let json = std::fs::read(fixtures().join("tokenizer.json")).unwrap();
    let recorded: Recorded = serde_json::from_slice(&json).unwrap();
    let folder = sprites().join("tokenizer");
    let read = |file: &str| match file {
        "tokenizer.json" => Ok(None),
        _ => Ok(std::fs::read(folder.join(file)).ok()),
    };
    let tokenizer = Tokenizer::from_files("tokenizer", read, 77).unwrap();
    check(&tokenizer, &recorded.sprites.plain);
}

#[test]
fn placeholders_are_checked() {
    let tokenizer = load(&fixtures().join("sd2-small/tokenizer"));
    let refuse = |tokens: &[&str]| {
        let tokens: Vec<String> = tokens.iter().map(|&t| t.to_owned()).collect();
        tokenizer
            .with_placeholders(&tokens)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refuse(&["<v>", "<v>"]),
        "\"<v>\" cannot be a concept's token: it is listed twice"
    );
    let taken = "the model's vocabulary has it already";
    assert_eq!(
        refuse(&["dog"]),
        format!("\"dog\" cannot be a concept's token: {taken}")
    );
    assert_eq!(
        refuse(&["Dog"]),
        format!("\"Dog\" cannot be a concept's token: {taken}")
    );
    assert_eq!(
        refuse(&["<|endoftext|>"]),
        format!("\"<|endoftext|>\" cannot be a concept's token: {taken}")
    );
    assert_eq!(
        refuse(&["<a b>"]),
        "\"<a b>\" cannot be a concept's token: it is empty or holds white space"
    );
    assert_eq!(
        refuse(&[""]),
        "\"\" cannot be a concept's token: it is empty or holds white space"
    );
    assert_eq!(
        tokenizer.word_ids("  ").unwrap_err().to_string(),
        "\"  \" has no token in this model's vocabulary"
    );
    let prompt = tokenizer
        .with_placeholders(&["<v>".to_owned()])
        .unwrap()
        .encode("<v> and <v>")
        .unwrap();
    assert_eq!(
        prompt.positions_of(tokenizer.base_vocab_size() as u32),
        [1, 3]
    );
}

#[test]
fn folders_without_a_vocabulary_are_refused() {
    let error = Tokenizer::from_files("m/tokenizer", |_| Ok(None), 77)
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "m/tokenizer: holds no CLIP vocabulary: neither tokenizer.json nor vocab.json with merges.txt"
    );
    let read = |file: &str| {
        Ok(match file {
            "vocab.json" => Some(br#"{"a": 0, "<|endoftext|>": 1}"#.to_vec()),
            "merges.txt" => Some(b"#version: 0.2\n".to_vec()),
            _ => None,
        })
    };
    let error = Tokenizer::from_files("m/tokenizer", read, 77)
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "m/tokenizer/vocab.json: the vocabulary lacks \"<|startoftext|>\""
    );
}

#[test]
fn merges_that_make_no_token_are_refused() {
    let vocab = br#"{"a": 0, "b": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}"#;
    // One that is longer than any token, and one that is not.
    for (merge, token) in [("<|startoftext|> b", "<|startoftext|>b"), ("a b", "ab")] {
        let merges = format!("#version: 0.2\n{merge}\n");
        let read = |file: &str| {
            Ok(match file {
                "vocab.json" => Some(vocab.to_vec()),
                "merges.txt" => Some(merges.clone().into_bytes()),
                _ => None,
            })
        };
        let error = Tokenizer::from_files("m/tokenizer", read, 77).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "m/tokenizer/vocab.json: the vocabulary lacks \"{token}\", which the merge \"{merge}\" makes"
            )
        );
    }
}
