//! Metrics as drawn curves. Series of one quantity share a chart: what stands before ` of ` or `: ` in their names.

use plotters::prelude::*;

use crate::recorder::Curve;

/// Width and height of a chart in its own units.
const SIZE: (u32, u32) = (620, 300);
/// From this many points on, a running mean is drawn over the pale raw values.
const SMOOTH_FROM: usize = 60;
const COLORS: [RGBColor; 6] = [
    RGBColor(0x3b, 0x7d, 0xd8),
    RGBColor(0xe0, 0x7b, 0x39),
    RGBColor(0x2f, 0x9e, 0x6e),
    RGBColor(0xb8, 0x4a, 0xb0),
    RGBColor(0xc9, 0x3a, 0x4b),
    RGBColor(0x6b, 0x77, 0x8d),
];
/// Stands for the color of the page's text, which is known only when it is shown.
const TEXT: RGBColor = RGBColor(1, 2, 3);
const TEXT_IN_SVG: &str = "#010203";

/// Curves of one quantity.
#[derive(Debug, Clone)]
pub(super) struct Chart<'a> {
    pub(super) title: String,
    curves: Vec<(String, &'a [(f64, f64)])>,
}

/// What a series measures, and of what.
fn split(series: &str) -> (&str, &str) {
    series
        .split_once(" of ")
        .or_else(|| series.split_once(": "))
        .unwrap_or((series, ""))
}

/// The charts, in the order of first appearance.
pub(super) fn charts(curves: &[Curve]) -> Vec<Chart<'_>> {
    let mut charts: Vec<(String, Chart<'_>)> = Vec::new();
    for curve in curves.iter().filter(|curve| curve.points.len() > 1) {
        let (quantity, object) = split(&curve.series);
        let key = format!("{}\n{quantity}", curve.node.id);
        let line = (object.to_owned(), curve.points.as_slice());
        match charts.iter_mut().find(|(known, _)| *known == key) {
            Some((_, chart)) => chart.curves.push(line),
            None => charts.push((
                key,
                Chart {
                    title: quantity.to_owned(),
                    curves: vec![line],
                },
            )),
        }
    }
    charts.into_iter().map(|(_, chart)| chart).collect()
}

impl Chart<'_> {
    /// The chart as SVG that takes its text color from the page; empty if it cannot be drawn.
    pub(super) fn svg(&self) -> String {
        let mut svg = String::new();
        if self.draw(&mut svg).is_err() {
            return String::new();
        }
        // The page says how large it is shown; it keeps its proportions.
        svg.replace(TEXT_IN_SVG, "currentColor")
            .replacen("<svg ", "<svg class=\"chart\" ", 1)
    }

    fn draw(&self, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let (x_range, y_range) = self.ranges();
        let decimals = decimals(y_range.1 - y_range.0);
        let mut chart = ChartBuilder::on(&root)
            .margin(8)
            .x_label_area_size(26)
            .y_label_area_size(52)
            .build_cartesian_2d(x_range.0..x_range.1, y_range.0..y_range.1)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(6)
            .y_labels(5)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.decimals$}"))
            .label_style(("sans-serif", 13).into_font().color(&TEXT.mix(0.75)))
            .axis_style(TEXT.mix(0.35))
            .bold_line_style(TEXT.mix(0.12))
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (i, (_, points)) in self.curves.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let finite = points
                .iter()
                .copied()
                .filter(|(x, y)| x.is_finite() && y.is_finite());
            if points.len() < SMOOTH_FROM {
                chart.draw_series(LineSeries::new(finite.clone(), color.stroke_width(2)))?;
                chart.draw_series(finite.map(|point| Circle::new(point, 3, color.filled())))?;
            } else {
                chart.draw_series(LineSeries::new(finite, color.mix(0.25)))?;
                chart.draw_series(LineSeries::new(running_mean(points), color.stroke_width(2)))?;
            }
        }
        root.present()?;
        Ok(())
    }

    /// Colors and names of the curves, if there is more than one.
    pub(super) fn legend(&self) -> Vec<(String, String)> {
        if self.curves.len() < 2 {
            return Vec::new();
        }
        let color = |i: usize| {
            let RGBColor(r, g, b) = COLORS[i % COLORS.len()];
            format!("#{r:02x}{g:02x}{b:02x}")
        };
        self.curves
            .iter()
            .enumerate()
            .map(|(i, (name, _))| (color(i), name.clone()))
            .collect()
    }

    /// Whether its values are shares of a whole.
    pub(super) fn is_share(&self) -> bool {
        self.title.to_lowercase().contains("iou")
    }

    /// Mean of the first and of the last tenth of all curves.
    pub(super) fn first_and_last(&self) -> Option<(f64, f64)> {
        let mean = |values: &mut dyn Iterator<Item = f64>| {
            let (sum, n) = values
                .filter(|v| v.is_finite())
                .fold((0.0, 0usize), |(s, n), v| (s + v, n + 1));
            (n > 0).then(|| sum / n as f64)
        };
        let tenth = |points: &[(f64, f64)]| points.len().div_ceil(10);
        let first = mean(
            &mut self
                .curves
                .iter()
                .flat_map(|(_, p)| p.iter().take(tenth(p)).map(|&(_, y)| y)),
        );
        let last = mean(
            &mut self
                .curves
                .iter()
                .flat_map(|(_, p)| p.iter().rev().take(tenth(p)).map(|&(_, y)| y)),
        );
        Some((first?, last?))
    }

    fn ranges(&self) -> ((f64, f64), (f64, f64)) {
        let all = || self.curves.iter().flat_map(|(_, points)| points.iter());
        let x = range(all().map(|&(x, _)| x));
        let (low, high) = range(all().map(|&(_, y)| y));
        // A share is read against 0 and 1, a loss against 0.
        let y = if self.is_share() {
            (0.0, 1.0)
        } else if low >= 0.0 {
            (0.0, high * 1.05)
        } else {
            (low, high)
        };
        (x, y)
    }
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let finite = values.filter(|value| value.is_finite());
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), v| {
        (lo.min(v), hi.max(v))
    });
    if low > high {
        (0.0, 1.0)
    } else if low == high {
        (low, low + 1.0)
    } else {
        (low, high)
    }
}

/// Enough decimals to tell the labels apart.
fn decimals(range: f64) -> usize {
    (1.0 - range.max(1e-9).log10().floor()).clamp(0.0, 6.0) as usize
}

/// Exponential mean over about a twentieth of the points.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let weight = 20.0 / points.len() as f64;
    let mut mean: Option<f64> = None;
    let finite = points
        .iter()
        .filter(|(x, y)| x.is_finite() && y.is_finite());
    finite
        .map(|&(x, y)| {
            let next = mean.map_or(y, |mean| mean + weight.min(0.5) * (y - mean));
            mean = Some(next);
            (x, next)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::NodeLabel;

    fn curve(series: &str, points: &[(f64, f64)]) -> Curve {
        let node = NodeLabel {
            id: "1".to_owned(),
            class: "X".to_owned(),
            title: "X".to_owned(),
        };
        Curve {
            node,
            series: series.to_owned(),
            points: points.to_vec(),
        }
    }

    #[test]
    fn series_of_one_quantity_share_a_chart() {
        let points = [(0.0, 0.5), (1.0, 0.7)];
        let curves = [
            curve("IoU of <a>", &points),
            curve("IoU of <b>", &points),
            curve("loss", &points),
            curve("one", &[(0.0, 1.0)]),
        ];
        let charts = charts(&curves);
        let titles: Vec<_> = charts.iter().map(|chart| chart.title.as_str()).collect();
        assert_eq!(titles, ["IoU", "loss"]);
        assert_eq!(charts[0].legend().len(), 2);
        assert_eq!(charts[1].first_and_last(), Some((0.5, 0.7)));
        let svg = charts[0].svg();
        assert!(
            svg.starts_with("<svg class")
                && svg.contains("currentColor")
                && !svg.contains(TEXT_IN_SVG),
            "{svg}"
        );
    }

    #[test]
    fn values_that_are_not_finite_do_not_stop_the_drawing() {
        let curves = [curve(
            "loss",
            &[(0.0, f64::NAN), (1.0, f64::INFINITY), (2.0, 1.0)],
        )];
        assert!(charts(&curves)[0].svg().contains("</svg>"));
    }
}
