//! Who is matched with whom.

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
