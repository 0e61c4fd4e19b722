// pycuda links libcurand; nothing here calls it.
extern "C" {
int curandGetDirectionVectors32() { return 201; }
int curandGetDirectionVectors64() { return 201; }
int curandGetScrambleConstants32() { return 201; }
int curandGetScrambleConstants64() { return 201; }
int curandGetVersion() { return 201; }
}
