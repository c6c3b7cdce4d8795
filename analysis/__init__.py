"""Numbers in, knowledge out: observations, laws, fits, forecasts, designs, figures."""
