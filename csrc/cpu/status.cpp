#include "sparc3/sparc3.h"

const char *sparc3_version(void) { return SPARC3_VERSION; }

const char *sparc3_strerror(int status) {
    switch (status) {
        case SPARC3_OK: return "success";
        case SPARC3_ERROR_ARGUMENT: return "a null pointer, an unknown dtype, or a size out of range";
        case SPARC3_ERROR_WORKSPACE: return "the workspace is too small";
        case SPARC3_ERROR_NAN: return "a score is NaN";
        case SPARC3_ERROR_STATE: return "a selection call out of order, or states of different selections";
        case SPARC3_ERROR_CHANGED: return "the scores of the second pass are not those of the first";
        case SPARC3_ERROR_ISA: return "this machine or build lacks the instruction set";
        case SPARC3_ERROR_CUDA: return "the CUDA driver or runtime reported an error";
        case SPARC3_ERROR_FORMAT: return "a packed weight contradicts itself";
        case SPARC3_ERROR_PATTERN: return "the weight is not N:M";
        case SPARC3_ERROR_OVERLAP: return "an output overlaps an input, another output or the workspace";
    }
    return "unknown status";
}
