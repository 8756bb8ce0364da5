"""What goes to disk and to the Hub beside the weights: files written safely, and model cards. Knows configurations as they lie in
files, and nothing of models or layers. May import `registration`."""
