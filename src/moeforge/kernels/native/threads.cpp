// The threads that on_threads (layer.h) computes with.
#include <omp.h>

extern "C" {

// Ends the workers that the calling thread has; its next call starts new ones. Not 0: it could not.
int moeforge_end_workers() { return omp_pause_resource_all(omp_pause_soft); }
}
