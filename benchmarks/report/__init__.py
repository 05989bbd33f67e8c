"""Tables and plots of the documentation, from results."""
