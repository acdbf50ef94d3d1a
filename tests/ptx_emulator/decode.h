// One line of PTX, cut into pieces, and the table of functions that turn it into an Inst. One function per instruction family.
#pragma once

#include "state.h"

namespace ptx {

struct Type {
  char kind = 0;  // b, u, s, f (IEEE), h (bf16), t (tf32), e (e4m3), g (e5m2), p (predicate)
  u32 bits = 0;
  u32 lanes = 1;  // 2 for f16x2, bf16x2, f32x2, e4m3x2
  u32 bytes() const { return bits * lanes / 8; }
  bool is_float() const { return kind == 'f' || kind == 'h'; }
  explicit operator bool() const { return kind; }
};
Type type_named(const std::string& name);  // falsy if name is no type

struct Operand {
  std::string text;                // as written
  bool address = false;            // [...]
  std::vector<std::string> items;  // {a, b} or a|b; one item otherwise
};

struct Parser;

struct Line {
  Parser* parser;
  std::string name;               // "ld"
  std::vector<std::string> mods;  // {"global", "v4", "b32"}
  std::vector<Operand> operands;
  u32 number;

  bool has(const std::string& mod) const;
  bool take(const std::string& mod);  // has, and strikes it off, so that leftovers are found
  Type take_type();                   // the first type among the modifiers, struck off
  std::vector<Type> types;            // those taken

  // Each adds operands to the instruction. `bytes` is the width that an immediate takes, and that a register must have if exact.
  void push(const std::string& item, u32 bytes, bool exact = true);
  void push_all(size_t operand, u32 bytes, bool exact = true);
  void push_predicate(const std::string& item);
  void push_address(size_t operand, Inst& inst, u32 bytes);  // register or symbol; sets inst.offset
  void want(size_t count);
  void want(size_t least, size_t most);
  void done();  // fails if a modifier is left that nobody understood
  [[noreturn]] void fail(const std::string& what) const;
  std::vector<Op> ops;
};

using Decoder = void (*)(Line&, Inst&);
struct Family {
  std::vector<std::pair<const char*, Decoder>> table;
};
const Family& arithmetic_family();
const Family& convert_family();
const Family& memory_family();
const Family& matrix_family();
const Family& control_family();
const Family& async_family();
const Family& wgmma_family();

u32 shared_variable(Parser&, const std::string&);

}  // namespace ptx
