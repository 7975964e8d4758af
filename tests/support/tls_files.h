#ifndef ADAATTN_TESTS_SUPPORT_TLS_FILES_H_
#define ADAATTN_TESTS_SUPPORT_TLS_FILES_H_

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

namespace adaattn {

inline std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// Throwaway certificates, made by the openssl command: DIR/ca.pem, and DIR/NAME.pem, DIR/NAME.key
// that it signs. They are valid for two days.
class TlsFiles {
 public:
  explicit TlsFiles(std::string dir) : dir_(std::move(dir)) {
    Run("-keyout " + Path("ca.key") + " -out " + Path("ca.pem") + " -subj /CN=adaattn-test-ca");
  }

  // `names`: the subject alternative name, as in "DNS:localhost,IP:127.0.0.1". Replaces the files.
  void Issue(const std::string& name, const std::string& names) const {
    Run("-CA " + Path("ca.pem") + " -CAkey " + Path("ca.key") + " -keyout " + Path(name + ".key") +
        " -out " + Path(name + ".pem") + " -subj /CN=" + name + " -addext subjectAltName=" + names +
        " -addext basicConstraints=critical,CA:FALSE");
  }

  std::string Path(const std::string& file) const { return dir_ + "/" + file; }
  std::string Text(const std::string& file) const { return ReadFile(Path(file)); }

 private:
  static void Run(const std::string& arguments) {
    const std::string command =
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 " +
        arguments + " >/dev/null 2>&1";
    ASSERT_EQ(std::system(command.c_str()), 0) << command;
  }

  const std::string dir_;
};

}  // namespace adaattn

#endif  // ADAATTN_TESTS_SUPPORT_TLS_FILES_H_
