//! The editor's settings: one JSON object of id to value in a file.

use std::io;
use std::path::PathBuf;

use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use super::folders::write_over;
use crate::confined::Root;

/// The settings cannot be kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    #[error("the settings {} are no JSON object; mend or remove the file", .0.display())]
    NotAnObject(PathBuf),
    #[error("cannot read or write the settings {}: {error}", path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("the settings would be larger than {} MiB together", MAX_BYTES >> 20)]
    TooLarge,
}

/// Largest file of all of them.
const MAX_BYTES: usize = 16 << 20;
/// Their file, beneath the user's.
pub(crate) const FILE: &str = "settings.json";

/// See the module.
pub(crate) struct Settings {
    path: PathBuf,
    values: Mutex<Map<String, Value>>,
}

impl Settings {
    /// Reads the file. Where nothing was chosen yet, the values are such that the editor opens without dialogs and asks
    /// nobody outside.
    ///
    /// # Errors
    /// See [`SettingsError`].
    pub(crate) fn open(user: &Root, front_end_version: &str) -> Result<Self, SettingsError> {
        let path = user.path().join(FILE);
        let mut values = match std::fs::read(&path) {
            Ok(bytes) => lenient_json::from_slice(&bytes)
                .map_err(|_| SettingsError::NotAnObject(path.clone()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Map::new(),
            Err(error) => return Err(SettingsError::File { path, error }),
        };
        for (id, value) in [
            ("Comfy.TutorialCompleted", json!(true)),
            ("Comfy.InstalledVersion", json!(front_end_version)),
            ("Comfy.Notification.ShowVersionUpdates", json!(false)),
        ] {
            values.entry(id).or_insert(value);
        }
        let values = Mutex::new(values);
        Ok(Self { path, values })
    }

    /// All of them.
    pub(crate) fn all(&self) -> Map<String, Value> {
        self.values.lock().clone()
    }

    /// One of them.
    pub(crate) fn get(&self, id: &str) -> Option<Value> {
        self.values.lock().get(id).cloned()
    }

    /// Changes some, on the disk first.
    ///
    /// # Errors
    /// See [`SettingsError`]; nothing is changed then.
    pub(crate) fn set(&self, changes: Map<String, Value>) -> Result<(), SettingsError> {
        let mut values = self.values.lock();
        let mut changed = values.clone();
        changed.extend(changes);
        let text = serde_json::to_vec_pretty(&changed).unwrap_or_default();
        if text.len() > MAX_BYTES {
            return Err(SettingsError::TooLarge);
        }
        write_over(&self.path, &text).map_err(|error| SettingsError::File {
            path: self.path.clone(),
            error,
        })?;
        *values = changed;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_chosen_stays_and_the_first_start_is_quiet() {
        let folder = tempfile::tempdir().unwrap();
        let user = Root::create(folder.path()).unwrap();
        let settings = Settings::open(&user, "1.2.3").unwrap();
        assert_eq!(settings.get("Comfy.InstalledVersion"), Some(json!("1.2.3")));
        let change = json!({"Comfy.TutorialCompleted": false, "x": [1]});
        settings.set(change.as_object().unwrap().clone()).unwrap();
        let again = Settings::open(&user, "2.0.0").unwrap().all();
        assert_eq!(
            (&again["x"], &again["Comfy.TutorialCompleted"]),
            (&json!([1]), &json!(false))
        );
        assert_eq!(again["Comfy.InstalledVersion"], "1.2.3");
        let half = |id: &str| Map::from_iter([(id.to_owned(), json!("7".repeat(MAX_BYTES / 2)))]);
        settings.set(half("one")).unwrap();
        let told = settings.set(half("other"));
        assert!(matches!(told, Err(SettingsError::TooLarge)));
        assert!(settings.get("one").is_some() && settings.get("other").is_none());
        std::fs::write(folder.path().join("settings.json"), "[]").unwrap();
        assert!(matches!(
            Settings::open(&user, ""),
            Err(SettingsError::NotAnObject(_))
        ));
    }
}
