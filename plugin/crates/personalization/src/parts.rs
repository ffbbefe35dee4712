//! The connected parts of a foreground, and which object each of them is.

/// The parts of a square plane that hang together by pixels' sides, as the indices of their pixels; only parts of at
/// least `least` pixels.
pub(crate) fn connected_parts(foreground: &[bool], size: usize, least: usize) -> Vec<Vec<usize>> {
    let mut is_left = foreground.to_vec();
    let mut parts = Vec::new();
    for start in 0..is_left.len() {
        if !is_left[start] {
            continue;
        }
        is_left[start] = false;
        let mut part = vec![start];
        let mut seen = 0;
        while let Some(&pixel) = part.get(seen) {
            seen += 1;
            let (x, y) = (pixel % size, pixel / size);
            let neighbors = [
                (x > 0).then(|| pixel - 1),
                (x + 1 < size).then(|| pixel + 1),
                (y > 0).then(|| pixel - size),
                (y + 1 < size).then(|| pixel + size),
            ];
            for neighbor in neighbors.into_iter().flatten() {
                if std::mem::take(&mut is_left[neighbor]) {
                    part.push(neighbor);
                }
            }
        }
        if part.len() >= least {
            parts.push(part);
        }
    }
    parts
}

/// One column for every row of a square matrix, so that the sum of the chosen entries is largest; exact, in
/// O(n²·2ⁿ).
pub(crate) fn best_assignment(score: &[Vec<f64>]) -> Vec<usize> {
    let n = score.len();
    // The best sum of the first rows on a set of columns, and the column of the last of these rows.
    let mut best = vec![(f64::NEG_INFINITY, 0); 1 << n];
    best[0].0 = 0.0;
    for set in 1usize..1 << n {
        let row = set.count_ones() as usize - 1;
        for column in (0..n).filter(|column| set >> column & 1 == 1) {
            let sum = best[set ^ 1 << column].0 + score[row][column];
            if sum > best[set].0 {
                best[set] = (sum, column);
            }
        }
    }
    let mut set = (1 << n) - 1;
    let mut columns: Vec<usize> = (0..n)
        .map(|_| {
            let column = best[set].1;
            set ^= 1 << column;
            column
        })
        .collect();
    columns.reverse();
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_hang_together_by_sides() {
        let picture = b"##..#\
                        #...#\
                        ..#..\
                        #...#\
                        .####";
        let foreground: Vec<bool> = picture.iter().map(|&v| v == b'#').collect();
        let sizes = |least| -> Vec<usize> {
            let parts = connected_parts(&foreground, 5, least);
            parts.iter().map(Vec::len).collect()
        };
        assert_eq!(sizes(1), [3, 2, 1, 1, 5]);
        assert_eq!(sizes(2), [3, 2, 5]);
    }

    #[test]
    fn the_best_assignment_is_the_best_of_all_permutations() {
        let score = vec![
            vec![0.9, 0.8, 0.1],
            vec![0.8, 0.1, 0.2],
            vec![0.7, 0.3, 0.6],
        ];
        // Each row's favorite is the first column.
        assert_eq!(best_assignment(&score), [1, 0, 2]);
        assert_eq!(best_assignment(&[vec![-3.0]]), [0]);
    }
}
