// What uses torch, as one translation unit: reading torch's headers takes most of a file's time.
#include "definitions.cpp"
#include "conv1d.cpp"
#include "linear.cpp"
#include "mixer.cpp"
#include "scan.cpp"
