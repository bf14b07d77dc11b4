// SPDX-License-Identifier: Apache-2.0
use std::fmt;

/// Columns as kubectl prints them: capital heads, three spaces between, no lines.
#[derive(Clone, Debug)]
pub struct Table {
    heads: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

const GAP: usize = 3;

impl Table {
    pub fn new<const N: usize>(heads: [&'static str; N]) -> Self {
        Self {
            heads: heads.into(),
            rows: Vec::new(),
        }
    }

    /// An empty cell is shown as `-`.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.heads.len());
        self.rows.push(cells.into());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cell = |text: &str| if text.is_empty() { "-" } else { text }.to_owned();
        let widths: Vec<usize> = (0..self.heads.len())
            .map(|column| {
                let cells = self
                    .rows
                    .iter()
                    .map(|row| cell(&row[column]).chars().count());
                cells.chain([self.heads[column].len()]).max().unwrap_or(0)
            })
            .collect();
        let mut line = |cells: &mut dyn Iterator<Item = String>| {
            let mut text = String::new();
            for (cell, width) in cells.zip(&widths) {
                text.push_str(&format!("{cell:<0$}", width + GAP));
            }
            writeln!(f, "{}", text.trim_end())
        };
        line(&mut self.heads.iter().map(|head| (*head).to_owned()))?;
        for row in &self.rows {
            line(&mut row.iter().map(|text| cell(text)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(["NODE", "STATE", "WHY"]);
        table.row(["node-1".into(), "ready".into(), String::new()]);
        table.row(["n".into(), String::new(), "a long reason".into()]);
        assert_eq!(
            table.to_string(),
            "NODE     STATE   WHY\nnode-1   ready   -\nn        -       a long reason\n"
        );
    }
}
