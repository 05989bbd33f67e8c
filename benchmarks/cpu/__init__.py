"""fastgpt compared with other implementations on a CPU."""
