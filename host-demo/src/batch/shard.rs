//! Which part of a manifest is this process's.

use std::fmt;
use std::str::FromStr;

/// For Kubernetes, which tells a pod its index but not how many there are.
const COUNT_VARIABLE: &str = "CONCEPTLOOM_SHARDS";

/// Part `index` (from 0) of `count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shard {
    index: usize,
    count: usize,
}

/// What a shard cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ShardError {
    #[error("a shard is i/n with i from 0 to n-1, for example 0/3; got \"{0}\"")]
    NotAShard(String),
    #[error("{0} is \"{1}\", which is no whole number")]
    NotANumber(&'static str, String),
    #[error(
        "JOB_COMPLETION_INDEX is set, but not {COUNT_VARIABLE}; set it to the job's number of completions"
    )]
    NoCount,
}

impl Shard {
    const WHOLE: Self = Self { index: 0, count: 1 };

    /// From a Slurm array or an indexed job of Kubernetes; else the whole.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub(crate) fn from_environment(
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ShardError> {
        let number = |name: &'static str| {
            let Some(text) = variable(name).filter(|text| !text.is_empty()) else {
                return Ok(None);
            };
            match text.parse::<usize>() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(ShardError::NotANumber(name, text)),
            }
        };
        if let Some(id) = number("SLURM_ARRAY_TASK_ID")? {
            // An array need not begin at 0.
            let first = number("SLURM_ARRAY_TASK_MIN")?.unwrap_or(0);
            let count = number("SLURM_ARRAY_TASK_COUNT")?.unwrap_or(1);
            return Self::new(id.wrapping_sub(first), count);
        }
        if let Some(index) = number("JOB_COMPLETION_INDEX")? {
            return Self::new(index, number(COUNT_VARIABLE)?.ok_or(ShardError::NoCount)?);
        }
        Ok(Self::WHOLE)
    }

    fn new(index: usize, count: usize) -> Result<Self, ShardError> {
        if index < count {
            Ok(Self { index, count })
        } else {
            Err(ShardError::NotAShard(format!("{index}/{count}")))
        }
    }

    /// Whether entry number `k` (from 0) is in it.
    pub(crate) fn has(self, k: usize) -> bool {
        k % self.count == self.index
    }
}

impl FromStr for Shard {
    type Err = ShardError;

    fn from_str(text: &str) -> Result<Self, ShardError> {
        let wrong = || ShardError::NotAShard(text.to_owned());
        let (index, count) = text.split_once('/').ok_or_else(wrong)?;
        let number = |text: &str| text.trim().parse().map_err(|_| wrong());
        Self::new(number(index)?, number(count)?)
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(pairs: &[(&str, &str)]) -> Result<String, ShardError> {
        let value = |name: &str| {
            pairs
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).to_owned())
        };
        Shard::from_environment(value).map(|shard| shard.to_string())
    }

    #[test]
    fn every_entry_is_in_one_shard() {
        let shards: Vec<Shard> = (0..3).map(|i| format!("{i}/3").parse().unwrap()).collect();
        for k in 0..10 {
            assert_eq!(shards.iter().filter(|shard| shard.has(k)).count(), 1);
        }
        for bad in ["3/3", "1", "a/b", "-1/3", "0/0", ""] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }

    #[test]
    fn schedulers_say_which() {
        assert_eq!(from(&[]).unwrap(), "0/1");
        let slurm = [
            ("SLURM_ARRAY_TASK_ID", "4"),
            ("SLURM_ARRAY_TASK_MIN", "1"),
            ("SLURM_ARRAY_TASK_COUNT", "8"),
        ];
        assert_eq!(from(&slurm).unwrap(), "3/8");
        assert_eq!(
            from(&[("JOB_COMPLETION_INDEX", "2")]).unwrap_err(),
            ShardError::NoCount
        );
        assert_eq!(
            from(&[("JOB_COMPLETION_INDEX", "2"), (COUNT_VARIABLE, "5")]).unwrap(),
            "2/5"
        );
        assert!(from(&[("SLURM_ARRAY_TASK_ID", "x")]).is_err());
        assert!(from(&[("SLURM_ARRAY_TASK_ID", "0"), ("SLURM_ARRAY_TASK_MIN", "1")]).is_err());
    }
}
