"""Studies: variants x tasks x seeds as data, run once each and compared with intervals."""
