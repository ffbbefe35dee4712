//! How much memory this process may have: the machine's, or less where a container or a limit says so.
//!
//! | what | where |
//! | --- | --- |
//! | the machine | `/proc/meminfo` |
//! | its container, and those around it | `memory.max` (cgroup v2), `memory.limit_in_bytes` (v1) |
//! | its address space (`ulimit -v`) | `/proc/self/limits` |
//!
//! Systems that do not tell in a file tell nothing. And where large blocks of it come from: [`Heap`].

mod heap;

use std::path::{Path, PathBuf};

pub use heap::{Heap, KeepFreed, keep_freed};

/// Bytes that this process may have in all; the same for as long as it runs, unless somebody changes its limits.
#[must_use]
pub fn total() -> Option<u64> {
    let limits = groups().into_iter().map(|group| group.limit);
    let limits = limits.chain(address_space(&read("/proc/self/limits")));
    limits
        .chain(kilobytes(&read("/proc/meminfo"), "MemTotal:"))
        .min()
}

/// Bytes that it could still get now. What it has freed and not given back to the system is not among them.
#[must_use]
pub fn available() -> Option<u64> {
    let left = groups().into_iter().filter_map(|group| group.left());
    let own = address_space(&read("/proc/self/limits")).and_then(|limit| {
        let used = kilobytes(&read("/proc/self/status"), "VmSize:")?;
        Some(limit.saturating_sub(used))
    });
    left.chain(own)
        .chain(kilobytes(&read("/proc/meminfo"), "MemAvailable:"))
        .min()
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Bytes on the line that begins with `key`, of files that count in kB.
fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let number = line.trim().trim_end_matches(" kB").parse::<u64>().ok()?;
    Some(number << 10)
}

/// The soft limit; none where it is `unlimited`.
fn address_space(limits: &str) -> Option<u64> {
    let mut lines = limits.lines();
    let line = lines.find_map(|line| line.strip_prefix("Max address space"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// A control group that limits memory.
struct Group {
    folder: PathBuf,
    limit: u64,
    version: Version,
}

#[derive(Clone, Copy)]
enum Version {
    One,
    Two,
}

impl Group {
    fn at(folder: &Path, version: Version) -> Option<Self> {
        let name = match version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        // "max" where there is no limit; a number beyond any machine's memory in the first version.
        let limit = read(folder.join(name)).trim().parse().ok()?;
        Some(Self {
            folder: folder.to_owned(),
            limit,
            version,
        })
    }

    /// What can be had before the limit: files that were read and can be read again do not count.
    fn left(&self) -> Option<u64> {
        let (used, of_files) = match self.version {
            Version::One => ("memory.usage_in_bytes", "total_inactive_file "),
            Version::Two => ("memory.current", "inactive_file "),
        };
        let used: u64 = read(self.folder.join(used)).trim().parse().ok()?;
        let stat = read(self.folder.join("memory.stat"));
        let of_files = stat.lines().find_map(|line| line.strip_prefix(of_files));
        let of_files = of_files.and_then(|number| number.trim().parse().ok());
        let used = used.saturating_sub(of_files.unwrap_or(0));
        Some(self.limit.saturating_sub(used))
    }
}

/// The groups that this process is in, from its own outward.
fn groups() -> Vec<Group> {
    folders(&read("/proc/self/cgroup"))
        .into_iter()
        .filter_map(|(folder, version)| Group::at(&folder, version))
        .collect()
}

/// Where the groups of a process lie, from what `/proc/self/cgroup` says: `0::/path` (v2) and `4:memory:/path` (v1).
fn folders(text: &str) -> Vec<(PathBuf, Version)> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (root, version) = match controllers {
            "" => ("/sys/fs/cgroup", Version::Two),
            names if names.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", Version::One)
            }
            _ => continue,
        };
        // Within a container the path may be that of the outside, which is not there; its root is.
        let own = Path::new(root).join(path.trim_start_matches('/'));
        let around = own
            .ancestors()
            .take_while(|folder| folder.starts_with(root));
        found.extend(around.map(|folder| (folder.to_owned(), version)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_system_are_read() {
        let text = "MemTotal:       24683652 kB\nMemFree:  1 kB\nMemAvailable:   16856360 kB\n";
        assert_eq!(kilobytes(text, "MemTotal:"), Some(24_683_652 << 10));
        assert_eq!(kilobytes(text, "MemAvailable:"), Some(16_856_360 << 10));
        assert_eq!(kilobytes(text, "SwapTotal:"), None);
        let limits = |soft: &str| {
            let title = "Limit                     Soft Limit           Hard Limit           Units";
            format!(
                "{title}\nMax address space         {soft}            unlimited            bytes\n"
            )
        };
        assert_eq!(address_space(&limits("8589934592")), Some(8 << 30));
        assert_eq!(address_space(&limits("unlimited")), None);
    }

    #[test]
    fn groups_are_looked_for_from_the_inside_out() {
        let text = "4:memory:/jobs/7\n3:cpu,cpuacct:/jobs/7\n0::/user/x\n";
        let found: Vec<_> = folders(text)
            .into_iter()
            .map(|(folder, _)| folder.display().to_string())
            .collect();
        let v1 = [
            "/sys/fs/cgroup/memory/jobs/7",
            "/sys/fs/cgroup/memory/jobs",
            "/sys/fs/cgroup/memory",
        ];
        let v2 = [
            "/sys/fs/cgroup/user/x",
            "/sys/fs/cgroup/user",
            "/sys/fs/cgroup",
        ];
        assert_eq!(found, [&v1[..], &v2].concat());
    }

    #[test]
    fn a_group_leaves_what_files_do_not_hold() {
        let folder = std::env::temp_dir().join(format!("machine-memory-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        for (name, text) in [
            ("memory.max", "1000\n"),
            ("memory.current", "700\n"),
            ("memory.stat", "anon 300\ninactive_file 400\n"),
        ] {
            std::fs::write(folder.join(name), text).expect("a file");
        }
        let group = Group::at(&folder, Version::Two).expect("a limit");
        assert_eq!((group.limit, group.left()), (1000, Some(700)));
        assert!(Group::at(&folder, Version::One).is_none());
        std::fs::remove_dir_all(&folder).expect("its own folder");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_has_memory() {
        let (total, available) = (total().expect("known"), available().expect("known"));
        assert!(
            available <= total && available > 0,
            "{available} of {total}"
        );
    }
}
