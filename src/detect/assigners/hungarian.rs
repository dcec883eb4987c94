//! Optimal one-to-one assignment.

/// Pairs rows with columns so that the summed cost is smallest; `min(rows, columns)` pairs.
///
/// Successive shortest augmenting paths with dual variables, O(n^2 m), in f64.
/// Between optima of equal cost the choice is unspecified but deterministic. Costs must be finite.
///
/// # Shapes
/// `cost` is row-major `[rows][columns]`. The pairs `(row, column)` come back in ascending order of the row.
///
/// # Source
/// Crouse, "On implementing 2D rectangular assignment algorithms", 2016 (after Jonker and Volgenant, 1987).
pub fn assign(cost: &[f32], rows: usize, columns: usize) -> Vec<(usize, usize)> {
    assert_eq!(cost.len(), rows * columns, "the cost matrix does not have rows * columns entries");
    assert!(cost.iter().all(|c| c.is_finite()), "an assignment cost is not finite");
    if rows == 0 || columns == 0 {
        return Vec::new();
    }
    if rows <= columns {
        let row_of = solve(rows, columns, |r, c| cost[r * columns + c] as f64);
        let mut pairs: Vec<_> = row_of.iter().enumerate().filter_map(|(c, r)| r.map(|r| (r, c))).collect();
        pairs.sort_unstable();
        pairs
    } else {
        // The search needs no more rows than columns: solve the transposed problem.
        let column_of = solve(columns, rows, |c, r| cost[r * columns + c] as f64);
        column_of.iter().enumerate().filter_map(|(r, c)| c.map(|c| (r, c))).collect()
    }
}

/// For `n <= m`: the row assigned to each of the `m` columns.
fn solve(n: usize, m: usize, cost: impl Fn(usize, usize) -> f64) -> Vec<Option<usize>> {
    let mut row_of: Vec<Option<usize>> = vec![None; m];
    let mut column_of: Vec<Option<usize>> = vec![None; n];
    let (mut dual_row, mut dual_column) = (vec![0.0f64; n], vec![0.0f64; m]);
    let mut distance = vec![f64::INFINITY; m];
    let mut previous_row = vec![usize::MAX; m];
    let (mut row_done, mut column_done) = (vec![false; n], vec![false; m]);
    for start in 0..n {
        distance.fill(f64::INFINITY);
        row_done.fill(false);
        column_done.fill(false);
        let (mut row, mut reached) = (start, 0.0f64);
        let sink = loop {
            row_done[row] = true;
            let (mut nearest, mut best) = (f64::INFINITY, usize::MAX);
            for c in 0..m {
                if column_done[c] {
                    continue;
                }
                let through = reached + cost(row, c) - dual_row[row] - dual_column[c];
                if through < distance[c] {
                    distance[c] = through;
                    previous_row[c] = row;
                }
                // Among equals a free column ends the search at once.
                let better = distance[c] < nearest || (distance[c] == nearest && row_of[c].is_none());
                if best == usize::MAX || better {
                    nearest = distance[c];
                    best = c;
                }
            }
            reached = nearest;
            column_done[best] = true;
            match row_of[best] {
                Some(next) => row = next,
                None => break best,
            }
        };
        for r in 0..n {
            if !row_done[r] {
                continue;
            }
            // Every visited row except the start was reached over its own column.
            dual_row[r] += match column_of[r] {
                Some(c) if r != start => reached - distance[c],
                _ => reached,
            };
        }
        for c in 0..m {
            if column_done[c] {
                dual_column[c] -= reached - distance[c];
            }
        }
        let mut c = sink;
        loop {
            let r = previous_row[c];
            row_of[c] = Some(r);
            let next = column_of[r].replace(c);
            if r == start {
                break;
            }
            c = next.expect("only the start of a path has no column yet");
        }
    }
    row_of
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn total(cost: &[f32], columns: usize, pairs: &[(usize, usize)]) -> f64 {
        pairs.iter().map(|&(r, c)| cost[r * columns + c] as f64).sum()
    }

    /// Smallest total over all ways to give every row (rows <= columns) a column of its own.
    fn brute_force(cost: &[f32], rows: usize, columns: usize, row: usize, used: u32) -> f64 {
        if row == rows {
            return 0.0;
        }
        (0..columns)
            .filter(|c| used & (1 << c) == 0)
            .map(|c| {
                cost[row * columns + c] as f64 + brute_force(cost, rows, columns, row + 1, used | (1 << c))
            })
            .fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #[test]
        fn assignment_is_optimal(
            (rows, columns) in (1usize..6, 1usize..7),
            values in proptest::collection::vec(-5i32..6, 36),
            fine in proptest::collection::vec(-1.0f32..1.0, 36),
            ties in any::<bool>(),
        ) {
            let cost: Vec<f32> = (0..rows * columns)
                .map(|i| if ties { values[i] as f32 } else { fine[i] * 3.0 })
                .collect();
            let pairs = assign(&cost, rows, columns);
            prop_assert_eq!(pairs.len(), rows.min(columns));
            for pair in pairs.windows(2) {
                prop_assert!(pair[0].0 < pair[1].0);
            }
            let mut used: Vec<_> = pairs.iter().map(|p| p.1).collect();
            used.sort_unstable();
            used.dedup();
            prop_assert_eq!(used.len(), pairs.len());
            let best = if rows <= columns {
                brute_force(&cost, rows, columns, 0, 0)
            } else {
                let transposed: Vec<f32> =
                    (0..columns * rows).map(|i| cost[(i % rows) * columns + i / rows]).collect();
                brute_force(&transposed, columns, rows, 0, 0)
            };
            prop_assert!((total(&cost, columns, &pairs) - best).abs() < 1e-6);
        }
    }

    #[test]
    fn empty_matrices_pair_nothing() {
        assert!(assign(&[], 0, 4).is_empty());
        assert!(assign(&[], 4, 0).is_empty());
    }
}
