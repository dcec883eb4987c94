// A stand-in `libnvrtc.so.13`: it takes every program and gives the text by which the stand-in driver finds the
// kernels that were compiled with it beforehand. For tests only.
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Result : int { SUCCESS = 0, INVALID_INPUT = 3, INVALID_PROGRAM = 4, COMPILATION = 6 };

struct Program {
  std::string stem, source, log, image;
};

void add_line(const char* name, unsigned long long threads, void* data) {
  std::string& log = *static_cast<std::string*>(data);
  log += "ptxas info    : Compiling entry function '" + std::string(name) + "' for 'emulated'\n";
  log += "ptxas info    : Function properties for " + std::string(name) + "\n";
  log += "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n";
  log += "ptxas info    : Used 32 registers, used 1 barriers (" + std::to_string(threads) + " threads)\n";
}

}  // namespace

EXPORT int nvrtcVersion(int* major, int* minor) {
  *major = 13, *minor = 0;
  return SUCCESS;
}
EXPORT const char* nvrtcGetErrorString(int result) {
  switch (result) {
    case SUCCESS: return "NVRTC_SUCCESS";
    case INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
    case INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
    case COMPILATION: return "NVRTC_ERROR_COMPILATION";
    default: return "NVRTC_ERROR unknown";
  }
}
EXPORT int nvrtcGetNumSupportedArchs(int* count) {
  *count = 7;
  return SUCCESS;
}
EXPORT int nvrtcGetSupportedArchs(int* chips) {
  const int all[] = {75, 80, 86, 89, 90, 100, 120};
  memcpy(chips, all, sizeof all);
  return SUCCESS;
}
EXPORT int nvrtcCreateProgram(Program** program, const char* source, const char* name, int, const char* const*,
                              const char* const*) {
  if (!source || !name) return INVALID_INPUT;
  std::string stem = name;
  stem = stem.substr(stem.find_last_of('/') + 1);
  stem = stem.substr(0, stem.find('.'));
  *program = new Program{stem, source, "", ""};
  return SUCCESS;
}
EXPORT int nvrtcDestroyProgram(Program** program) {
  if (!program || !*program) return INVALID_PROGRAM;
  delete *program;
  *program = nullptr;
  return SUCCESS;
}
EXPORT int nvrtcCompileProgram(Program* program, int, const char* const*) {
  if (!program) return INVALID_PROGRAM;
  const size_t at = program->source.find("#error emulated");
  if (at != std::string::npos) {
    size_t line = 1;
    for (size_t i = 0; i < at; ++i) line += program->source[i] == '\n';
    program->log = program->stem + ".cu(" + std::to_string(line) + "): error: #error directive: emulated\n";
    return COMPILATION;
  }
  program->image = "boxwright-emulated:" + program->stem;
  // The driver knows which kernels there are, if it is loaded.
  using Visit = void (*)(const char*, unsigned long long, void*);
  using Kernels = void (*)(const char*, Visit, void*);
  const Kernels kernels = (Kernels)dlsym(RTLD_DEFAULT, "boxwright_emulator_kernels");
  if (kernels) kernels(program->stem.c_str(), add_line, &program->log);
  return SUCCESS;
}

// Sizes count the zero byte at the end, as the real library's do for texts.
static int give_size(const Program* program, const std::string& text, size_t* bytes) {
  if (!program) return INVALID_PROGRAM;
  *bytes = text.size() + 1;
  return SUCCESS;
}
static int give(const Program* program, const std::string& text, char* out) {
  if (!program) return INVALID_PROGRAM;
  memcpy(out, text.c_str(), text.size() + 1);
  return SUCCESS;
}
EXPORT int nvrtcGetCUBINSize(Program* p, size_t* bytes) { return p ? give_size(p, p->image, bytes) : INVALID_PROGRAM; }
EXPORT int nvrtcGetCUBIN(Program* p, char* out) { return p ? give(p, p->image, out) : INVALID_PROGRAM; }
EXPORT int nvrtcGetPTXSize(Program* p, size_t* bytes) { return p ? give_size(p, p->image, bytes) : INVALID_PROGRAM; }
EXPORT int nvrtcGetPTX(Program* p, char* out) { return p ? give(p, p->image, out) : INVALID_PROGRAM; }
EXPORT int nvrtcGetProgramLogSize(Program* p, size_t* bytes) { return p ? give_size(p, p->log, bytes) : INVALID_PROGRAM; }
EXPORT int nvrtcGetProgramLog(Program* p, char* out) { return p ? give(p, p->log, out) : INVALID_PROGRAM; }
EXPORT int nvrtcAddNameExpression(Program* p, const char*) { return p ? SUCCESS : INVALID_PROGRAM; }
