//! Which object owns which part of the foreground.
//!
//! ```text
//! p(owners) ∝ Π_r exp(v_r,owner(r))   over all assignments in which every object owns a part
//! q_r(c) = Σ of p over those with owner(r) = c
//! ln Z   = ln Σ over all of them of Π_r exp(v_r,owner(r))                        the evidence that they are about
//! ```
//! | symbol | shape | meaning |
//! | --- | --- | --- |
//! | v | `[R][C]`, nats | evidence of every part for every object, summed over its pixels |
//! | q | `[R][C]` in [0, 1] | posterior; a row sums to 1 |
//!
//! Where the most probable owners by themselves would leave an object without a part (words that say the same of
//! everything), the most probable assignment as a whole takes their place.
//!
//! Exact, by a forward and a backward pass over the parts whose state is the set of objects that own one already:
//! O(R · C · 2^C). With fewer parts than objects, or too many objects for that, parts are independent.

/// Most objects whose sets are enumerated.
const MOST_OBJECTS: usize = 12;

/// Who owns what.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Owners {
    /// q of every part.
    pub(crate) posterior: Vec<Vec<f64>>,
    /// ln Z in nats.
    pub(crate) log_evidence: f64,
}

/// The posterior of every part.
pub(crate) fn owners(evidence: &[Vec<f64>], n_objects: usize) -> Owners {
    if evidence.len() < n_objects || n_objects > MOST_OBJECTS {
        return Owners {
            posterior: evidence.iter().map(|row| softmax(row)).collect(),
            log_evidence: evidence.iter().map(|row| log_sum(row)).sum(),
        };
    }
    let (n_parts, n_sets) = (evidence.len(), 1usize << n_objects);
    let mut forward = vec![vec![f64::NEG_INFINITY; n_sets]; n_parts + 1];
    forward[0][0] = 0.0;
    for (part, row) in evidence.iter().enumerate() {
        for set in 0..n_sets {
            let before = forward[part][set];
            for (object, v) in row.iter().enumerate() {
                let after = &mut forward[part + 1][set | 1 << object];
                *after = log_add(*after, before + v);
            }
        }
    }
    // From a set to all of them.
    let mut backward = vec![vec![f64::NEG_INFINITY; n_sets]; n_parts + 1];
    backward[n_parts][n_sets - 1] = 0.0;
    for (part, row) in evidence.iter().enumerate().rev() {
        for set in 0..n_sets {
            backward[part][set] = row
                .iter()
                .enumerate()
                .fold(f64::NEG_INFINITY, |sum, (c, v)| {
                    log_add(sum, v + backward[part + 1][set | 1 << c])
                });
        }
    }
    let posterior = |part: usize, object: usize| {
        (0..n_sets).fold(f64::NEG_INFINITY, |sum, set| {
            let after = backward[part + 1][set | 1 << object];
            log_add(sum, forward[part][set] + evidence[part][object] + after)
        })
    };
    let marginals: Vec<Vec<f64>> = (0..n_parts)
        .map(|part| {
            let logs: Vec<f64> = (0..n_objects).map(|c| posterior(part, c)).collect();
            softmax(&logs)
        })
        .collect();
    let owns = |object: usize| marginals.iter().any(|row| first_largest(row) == object);
    let log_evidence = forward[n_parts][n_sets - 1];
    if (0..n_objects).all(owns) {
        return Owners {
            posterior: marginals,
            log_evidence,
        };
    }
    let certain = |owner: usize| {
        (0..n_objects)
            .map(|c| f64::from(u8::from(c == owner)))
            .collect()
    };
    let most_probable = most_probable(evidence, n_objects).into_iter();
    Owners {
        posterior: most_probable.map(certain).collect(),
        log_evidence,
    }
}

/// The assignment with the largest evidence among those in which every object owns a part; the first of equals.
fn most_probable(evidence: &[Vec<f64>], n_objects: usize) -> Vec<usize> {
    let n_sets = 1usize << n_objects;
    // The best sum of the parts so far by the set of objects that own one, and the owner and set before it.
    let mut best = vec![vec![(f64::NEG_INFINITY, 0, 0); n_sets]; evidence.len() + 1];
    best[0][0].0 = 0.0;
    for (part, row) in evidence.iter().enumerate() {
        for set in 0..n_sets {
            let before = best[part][set].0;
            for (object, v) in row.iter().enumerate() {
                let after = &mut best[part + 1][set | 1 << object];
                if before + v > after.0 {
                    *after = (before + v, object, set);
                }
            }
        }
    }
    let mut set = n_sets - 1;
    let mut owners: Vec<usize> = (0..evidence.len())
        .rev()
        .map(|part| {
            let (_, owner, before) = best[part + 1][set];
            set = before;
            owner
        })
        .collect();
    owners.reverse();
    owners
}

fn first_largest(row: &[f64]) -> usize {
    (1..row.len()).fold(0, |best, c| if row[c] > row[best] { c } else { best })
}

/// ln(e^a + e^b).
fn log_add(a: f64, b: f64) -> f64 {
    let (high, low) = if a > b { (a, b) } else { (b, a) };
    if low == f64::NEG_INFINITY {
        high
    } else {
        high + (low - high).exp().ln_1p()
    }
}

/// ln Σ e^v.
pub(crate) fn log_sum(logs: &[f64]) -> f64 {
    logs.iter()
        .fold(f64::NEG_INFINITY, |sum, &v| log_add(sum, v))
}

pub(crate) fn softmax(logs: &[f64]) -> Vec<f64> {
    let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logs.iter().map(|v| (v - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All assignments, one by one.
    fn enumerated(evidence: &[Vec<f64>], n_objects: usize) -> Owners {
        let n_parts = evidence.len();
        let mut sums = vec![vec![0.0; n_objects]; n_parts];
        let mut total = 0.0;
        for code in 0..n_objects.pow(n_parts as u32) {
            let owner: Vec<usize> = (0..n_parts)
                .map(|part| code / n_objects.pow(part as u32) % n_objects)
                .collect();
            if (0..n_objects).any(|c| !owner.contains(&c)) {
                continue;
            }
            let p = (0..n_parts)
                .map(|r| evidence[r][owner[r]])
                .sum::<f64>()
                .exp();
            total += p;
            for (part, &c) in owner.iter().enumerate() {
                sums[part][c] += p;
            }
        }
        let divided = |row: Vec<f64>| row.into_iter().map(|v| v / total).collect();
        Owners {
            posterior: sums.into_iter().map(divided).collect(),
            log_evidence: total.ln(),
        }
    }

    #[test]
    fn the_posterior_is_that_of_all_assignments() {
        let evidence = vec![
            vec![0.9, 0.1, -0.3],
            vec![1.2, -0.5, 0.0],
            vec![0.4, 0.2, 0.1],
            vec![-1.0, 0.8, 0.3],
        ];
        let (found, expected) = (owners(&evidence, 3), enumerated(&evidence, 3));
        let pairs = found.posterior.iter().zip(&expected.posterior);
        for (a, b) in pairs.flat_map(|(a, b)| a.iter().zip(b)) {
            assert!((a - b).abs() < 1e-12, "{found:?} {expected:?}");
        }
        assert!((found.log_evidence - expected.log_evidence).abs() < 1e-12);
    }

    #[test]
    fn everyone_owns_a_part_though_all_evidence_is_for_one() {
        let evidence = vec![vec![0.0, -900.0], vec![0.0, -700.0]];
        let found = owners(&evidence, 2).posterior;
        assert!(found[0][0] > 0.999 && found[1][1] > 0.999, "{found:?}");
        // A third part is nobody's by force.
        let evidence = [evidence, vec![vec![0.0, -5.0]]].concat();
        let found = owners(&evidence, 2).posterior;
        assert!(
            found[2][1] > 0.99,
            "the cheapest part is given up: {found:?}"
        );
    }

    #[test]
    fn words_that_say_the_same_of_everything_share_the_parts_out() {
        let found = owners(&[vec![0.5, 0.5], vec![0.2, 0.2], vec![0.1, 0.1]], 2).posterior;
        let owner: Vec<usize> = found.iter().map(|row| first_largest(row)).collect();
        assert!(owner.contains(&0) && owner.contains(&1), "{found:?}");
    }

    #[test]
    fn fewer_parts_than_objects_are_independent() {
        let found = owners(&[vec![1.0, 1.0, 0.0]], 3).posterior;
        assert!((found[0][0] - found[0][1]).abs() < 1e-12 && found[0][2] < found[0][0]);
    }
}
