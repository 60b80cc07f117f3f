"""Channel mixers (feed-forward halves): one file each, with the same contract as a token mixer."""
